"""Private APIs of FSDP2: the state that `fully_shard` gives a module, and its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning_largescale.compat._fsdp_state import all_of, group_of, groups_of, replace_methods, state_of


def has_group(module: Any) -> bool:
    """Return whether `module`, which `fully_shard` was applied to, has parameters of its own.

    Replaced by a public way to list the parameters of an FSDP group.
    """
    return group_of(module) is not None


def become_root(module: Any, beside: Any = ()) -> None:
    """Make `module`, which `fully_shard` was applied to, the root of its FSDP groups and of those of the modules
    `beside` it, without an all-gather.

    Replaced by a public way to choose the root; else it is the module that runs first, which unshards its parameters.
    """
    names = [f"_largescale_beside_{index}" for index, _ in enumerate(beside)]
    for name, one in zip(names, beside, strict=True):
        module.add_module(name, one)
    try:
        state_of(module)._lazy_init()
    finally:
        for name in names:
            delattr(module, name)


def forget_forward(module: Any) -> None:
    """Detach FSDP2 from the `forward` of `module`, which `fully_shard` was applied to.

    Replaced by a public way to name the methods that count as forward; `register_fsdp_forward_method` only adds one.
    """
    state = state_of(module)
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def undo_sharding(module: Any) -> None:
    """Undo `fully_shard` on `module`; its parameters stay as they are.

    Replaced by a public inverse of `fully_shard`.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state = state_of(module)
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in groups_of(module):
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
        # Otherwise a plain parameter is taken for a shard when the module loads a state.
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    del _module_state_mapping[module]
    for key in (STATE_KEY, REGISTRY_KEY):
        vars(module).pop(key, None)
    module.__class__ = type(module).__mro__[2]
    for part in module.modules():
        for name in _MARKS:
            vars(part).pop(name, None)


# Attributes that `fully_shard` sets on every module of a group.
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def sharding_attributes() -> set[str]:
    """Return the names of the attributes that `fully_shard` sets on a module.

    Replaced by a public inverse of `fully_shard` for a module or its copy.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return {STATE_KEY, REGISTRY_KEY, *_MARKS}


@contextmanager
def without_gathering(module: Any) -> Iterator[None]:
    """Context in which a forward of `module`, which `fully_shard` was applied to, neither unshards nor reshards.

    Replaced by a public context of FSDP2, such as `summon_full_params` of FSDP1.
    """
    state = state_of(module)
    before = [
        (state._pre_forward_hook_handle.id, module._forward_pre_hooks, dict(module._forward_pre_hooks)),
        (state._post_forward_hook_handle.id, module._forward_hooks, dict(module._forward_hooks)),
    ]
    for handle, hooks, _ in before:
        hooks.pop(handle, None)
    try:
        yield
    finally:
        for _, hooks, ordered in before:
            added = {key: hook for key, hook in hooks.items() if key not in ordered}
            hooks.clear()
            hooks.update(ordered)
            hooks.update(added)


@contextmanager
def sharded_in_place(module: Any) -> Iterator[None]:
    """Context in which `module`, which `fully_shard` was applied to, has its shards as parameters even if it is
    unsharded; the unsharded parameters stay in memory.

    Replaced by a public way to reach the sharded parameters, which have the gradients, of an unsharded module.
    """
    group = group_of(module)
    unsharded = group.fsdp_params if group is not None and group.is_unsharded else []
    for one in unsharded:
        one._setattr_on_modules(one.sharded_param)
    try:
        yield
    finally:
        # Unless the block has resharded the group.
        for one in unsharded if group is not None and group.is_unsharded else []:
            one._setattr_on_modules(one.unsharded_param)


def gather_for_backward_of(block: Any, tensors: list[Any]) -> None:
    """Have the backward of `tensors`, part of the output of `block`, unshard it, if FSDP2 has not registered that.

    Replaced by requiring a torch whose FSDP2 finds tensors in dataclasses, as 2.13 does and 2.11 does not.
    """
    from torch.distributed.fsdp import _common_utils

    if hasattr(_common_utils, "collect_grad_tensors"):
        return
    for tensor in tensors:
        tensor.register_hook(state_of(block)._pre_backward)


def is_of_sharding(hook: Any) -> bool:
    """Return whether `hook`, a gradient hook of a tensor, is FSDP2's, which returns the gradient unchanged.

    Replaced by a public way to tell when a module's backward begins.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    return isinstance(getattr(hook, "__self__", None), FSDPState)


def is_of_group(frame: FrameType) -> bool:
    """Return whether `frame` runs FSDP2's code for the all-gather and the reduction, which calls no user code.

    Replaced as `calls_collective`.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

    return frame.f_code.co_filename in (_fsdp_collectives.__file__, _fsdp_param_group.__file__)


def before_backward_ends(module: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Call `call` at the end of each backward of `module`, the root of its FSDP groups, before FSDP2's own callback.

    Replaced by a public `FSDPModule` hook at the end of a backward.

    Returns:
        A function that removes the call.
    """
    undo = []
    for state in state_of(module)._state_ctx.all_states:
        end = state._root_post_backward_final_callback

        def end_after(end: Callable[[], None] = end) -> None:
            call()
            end()

        undo.append(replace_methods(state, _root_post_backward_final_callback=end_after))
    return all_of(undo)


def forget_sharded_step(module: Any) -> None:
    """Reset the step of `module`, the root of its FSDP groups, that was under way; unreduced gradients are dropped.

    Replaced by `FSDPModule.reset_iter_state` alone, if it dropped gradients of unsharded parameters; torch 2.11 has no
    such method.
    """
    root = state_of(module)
    states = root._state_ctx.all_states
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    for group in groups:
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
        return
    root._device_handle.synchronize()
    idle = type(root._training_state).IDLE
    for group in groups:
        if group._all_gather_result is not None and group._all_gather_result.all_gather_work is not None:
            group._all_gather_result.all_gather_work.wait()
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = group._partial_reduce_output = None
        group._post_forward_indices.clear()
        group._training_state = idle
        group._to_sharded()
    for state in states:
        state._training_state = idle
    root._comm_ctx.all_gather_state = root._comm_ctx.reduce_scatter_state = None
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
