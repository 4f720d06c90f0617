"""Private APIs of nn.Module and Optimizer: children, tensors, hooks, compilation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def all_children(module: Any) -> list[tuple[str, Any]]:
    """Return the children of `module` with their names; a child with several names is repeated.

    Replaced by `named_children(remove_duplicate=False)`.
    """
    return [(name, child) for name, child in module._modules.items() if child is not None]


def own_tensors(module: Any) -> tuple[MutableMapping[str, Any], MutableMapping[str, Any]]:
    """Return the dicts of the parameters and of the buffers of `module` itself; writing into them replaces tensors.

    Replaced by `setattr`, if it accepted any tensor as a parameter and bypassed subclasses' own `__setattr__`.
    """
    return module._parameters, module._buffers


def compiled_module(module: Any) -> Any:
    """Return the module inside the result of `torch.compile(module)`; `module` itself if it is no such result.

    Replaced by a public way from an OptimizedModule to the module that it wraps.
    """
    inner = dict(all_children(module)).get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module


def is_compiled(module: Any) -> bool:
    """Return whether `module` is the result of `torch.compile`, or its `compile()` was called, or a Trainer unwrapped
    this LightningModule from such a result.

    Replaced by a public way to ask.
    """
    of_trainer = vars(module).get("_compiler_ctx") is not None
    return compiled_module(module) is not module or module._compiled_call_impl is not None or of_trainer


def hook_tables(module: Any) -> list[dict[int, Any]]:
    """Return the dicts that hold the hooks of `module` itself and their options, by the id of the hook.

    Replaced by a public way to list and to remove the hooks of a module.
    """
    return [value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)]


def has_full_backward_hooks(module: Any) -> bool:
    """Return whether a submodule of `module`, or every module, has a full backward hook or a full backward pre-hook.

    Replaced by a public way to list the hooks of a module.
    """
    from torch.nn.modules import module as torch_module

    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        return True
    return any(part._backward_hooks or part._backward_pre_hooks for part in module.modules() if part is not module)


def hook_nearest(optimizer: Any, before: Any, after: Any) -> Callable[[], None]:
    """Register hooks on the step of an optimizer that run nearest to the step.

    Replaced by a `prepend` argument of `Optimizer.register_step_post_hook`.

    Args:
        optimizer: The optimizer.
        before: The pre-hook, which runs last.
        after: The post-hook, which runs first.

    Returns:
        A function that removes both.
    """
    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    optimizer._optimizer_step_post_hooks.move_to_end(handles[1].id, last=False)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@contextmanager
def without_step_hooks(optimizer: Any) -> Iterator[None]:
    """Context in which steps of `optimizer`, and those of base classes that they call, call no hooks of it.

    Replaced by a public way to step without hooks.
    """
    before = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before
