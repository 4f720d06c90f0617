"""Private APIs of autograd: the graph, hooks of tensors, and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def sequence_number() -> int:
    """Return the sequence number of the next autograd node that this thread makes.

    Replaced by a public way to tell which forward code made a node.
    """
    return int(torch._C._autograd._get_sequence_nr())


def current_node_sequence() -> int | None:
    """Return the sequence number of the autograd node that runs on this thread; None outside backward.

    Replaced by a public `torch.autograd.graph.current_node()` with a public sequence number.
    """
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def current_backward() -> int:
    """Return an id of the backward under way on this thread; a nested backward has another.

    Replaced by a public way to tell a backward from a nested one.
    """
    return torch._C._current_graph_task_id()


def call_after_backward(tensor: Any, function: Any) -> None:
    """Call `function`, without arguments, at the end of each backward that passes `tensor`.

    Replaced by a public `queue_callback` of the autograd engine, which FSDP2 and DistributedDataParallel use as well.
    """
    from torch.autograd import Variable

    tensor.register_hook(lambda _: Variable._execution_engine.queue_callback(function))


def gradient_hooks(tensor: Any) -> tuple[list[Any], list[Any]]:
    """Return the hooks of the leaf `tensor`: of `register_hook`, and of `register_post_accumulate_grad_hook`.

    Replaced by a public way to list the hooks of a tensor.
    """
    hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    before, after = ([*(one or {}).values()] for one in hooks)
    return before, after


def hooks_saved_tensors() -> bool:
    """Return whether hooks on saved tensors are in force on this thread, or disabled.

    Replaced by a public way to read the innermost `torch.autograd.graph.saved_tensors_hooks`.
    """
    autograd: Any = torch._C._autograd
    return not autograd._saved_tensors_hooks_is_enabled() or bool(autograd._top_saved_tensors_default_hooks(False))


def around_engine(function: Any) -> Callable[[], None]:
    """Call `function` instead of autograd's engine for each `torch.autograd.grad` or `backward` that names its inputs.

    A function that is passed in several calls of this one is called once per backward.

    Replaced by a public hook of `torch.autograd.grad`; a torch function mode would intercept every function of a step.

    Args:
        function: Receives a function that runs the engine for given inputs, and the inputs; by keyword `create_graph`,
            and `accumulate`, whether the engine accumulates into `.grad`. Returns the engine's result.

    Returns:
        A function that removes `function`.
    """
    if not _engine_users:
        _engines.append(_autograd._engine_run_backward)
        _autograd._engine_run_backward = _run_engine
    user = [function]
    _engine_users.append(user)

    def undo() -> None:
        # By identity, since the same function may be there twice.
        _engine_users[:] = [one for one in _engine_users if one is not user]
        if not _engine_users and _engines:
            _autograd._engine_run_backward = _engines.pop()

    return undo


_autograd: Any = torch.autograd
_engine_users: list[list[Any]] = []
_engines: list[Any] = []


def _run_engine(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    engine = _engines[0]
    gradients, keep, create, inputs, *rest = args
    for function in dict.fromkeys(user[0] for user in _engine_users) if inputs else ():
        engine = _through(function, engine)
    return engine(outputs, gradients, keep, create, inputs, *rest, **kwargs)


def _through(function: Any, engine: Any) -> Any:
    def run(outputs: Any, gradients: Any, keep: Any, create: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        def with_inputs(others: Any) -> Any:
            return engine(outputs, gradients, keep, create, others, *rest, **kwargs)

        accumulate = bool(kwargs.get("accumulate_grad"))
        return function(with_inputs, inputs, create_graph=bool(create), accumulate=accumulate)

    return run
