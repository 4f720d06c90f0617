"""FSDP2's internal state of a module and of its parameter groups, as several modules of compat read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def state_of(module: Any) -> Any:
    """Return the FSDPState of `module`, which `fully_shard` was applied to."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard.state(module)  # type: ignore[attr-defined]


def group_of(module: Any) -> Any:
    """Return the FSDPParamGroup of `module`; None if it has no parameters of its own."""
    return state_of(module)._fsdp_param_group


def groups_of(module: Any) -> list[Any]:
    """Return the FSDPParamGroups of `module`, of which recent versions of torch have several."""
    state = state_of(module)
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def parameter_of(module: Any, shard: Any) -> Any:
    """Return the FSDPParam of the group of `module` whose sharded parameter is `shard`."""
    return next(parameter for parameter in group_of(module).fsdp_params if parameter.sharded_param is shard)


def replace_methods(target: Any, **methods: Any) -> Callable[[], None]:
    """Replace methods of one object; return a function that restores what they replaced, even after others did so."""
    before = {name: vars(target).get(name) for name in methods}
    for name, method in methods.items():
        setattr(target, name, method)

    def undo() -> None:
        for name, replaced in before.items():
            if replaced is None:
                delattr(target, name)
            else:
                setattr(target, name, replaced)

    return undo


def all_of(functions: Iterable[Callable[[], None]]) -> Callable[[], None]:
    """Return a function that calls `functions` in order."""
    called = list(functions)

    def call_all() -> None:
        for function in called:
            function()

    return call_all


def own_gradient(parameter: Any) -> Any:
    """Return the gradient that torch stores; `grad` of an unsharded parameter may return that of the shard."""
    import torch

    descriptor: Any = torch.Tensor.grad
    return descriptor.__get__(parameter)


def set_own_gradient(parameter: Any, gradient: Any) -> None:
    """Set the gradient that `own_gradient` returns."""
    import torch

    descriptor: Any = torch.Tensor.grad
    descriptor.__set__(parameter, gradient)


def post_accumulate_hooks(parameter: Any) -> dict[int, Callable[[Any], None]]:
    """Return the hooks that torch calls when it has accumulated a gradient of `parameter`, to read and to change."""
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}


def has_unreduced_gradient(parameter: Any) -> bool:
    """Return whether an FSDPParam has a gradient that was not reduced."""
    if parameter.unsharded_accumulated_grad is not None:
        return True
    return hasattr(parameter, "_unsharded_param") and own_gradient(parameter._unsharded_param) is not None


def unreduced_gradient(parameter: Any) -> Any:
    """Return the gradient of an FSDPParam that was not reduced, as one tensor; None if there is none.

    FSDP2 keeps the gradient of the last backward in the leaf if it is reduced in the leaf's dtype, and the sum of
    earlier ones, or any gradient that is reduced in another dtype, beside it.
    """
    if not has_unreduced_gradient(parameter):
        return None
    leaf, gradient = parameter._unsharded_param, parameter.unsharded_accumulated_grad
    recent = own_gradient(leaf)
    if gradient is None:
        return recent
    if recent is not None:
        gradient += recent
        set_own_gradient(leaf, None)
    return gradient
