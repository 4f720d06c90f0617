"""Private APIs of what autograd saves."""

from __future__ import annotations

from typing import Any

import torch


def versions_of(tensor: Any) -> Any:
    """A tensor without values whose `version` is that of `tensor` from now on; it keeps none of its memory.

    Replaced by a public `torch.Tensor.version`, and a way to keep it without the tensor.
    """
    found = tensor.detach()
    # Takes all but the counter.
    found.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return found


def hooks_saved_tensors() -> bool:
    """Whether hooks on saved tensors are in force on this thread, or forbidden.

    Replaced by a public way to ask which `torch.autograd.graph.saved_tensors_hooks` is the innermost.
    """
    autograd: Any = torch._C._autograd
    return not autograd._saved_tensors_hooks_is_enabled() or bool(autograd._top_saved_tensors_default_hooks(False))


def current_backward() -> int:
    """A number of the backward under way on this thread, which one that begins within it does not share.

    Replaced by a public way to tell a backward from one within it.
    """
    return torch._C._current_graph_task_id()


def around_engine(function: Any) -> Any:
    """Have `function` make each call of `torch.autograd.grad` and `backward` that says with respect to which tensors;
    what undoes it.

    It gets what calls autograd's engine with such tensors, those that were given, whether a graph is to be made, and
    whether gradients are accumulated in `.grad`, and returns what the engine does. One that is given several times is
    called once.

    Replaced by a public hook of `torch.autograd.grad`; a mode for functions would be asked of each function of a step.
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
