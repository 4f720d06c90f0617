"""Private APIs of torch.distributed: process groups and FSDP2."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


def fake_process_group() -> None:
    """Put a group of as many ranks in the place of this process's groups, whose collectives return at once.

    For a fork, which has the connections of the process that it came from and may not use them. Replaced by a public
    way to leave a process group without a word to the others.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, size = dist.get_rank(), dist.get_world_size()
    # Kept, since the end of a group would be told to the others.
    _left.append(distributed_c10d._world)
    distributed_c10d._world = distributed_c10d._World()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


_left: list[Any] = []


def forget_groups_of(mesh: Any) -> None:
    """Let `mesh` hold its process groups no more, whose end is the end of their threads; it finds them by their names.

    Replaced by a `destroy_process_group` that ends the threads of gloo whoever refers to a group.
    """
    # Not in torch 2.11.
    getattr(mesh, "_pg_registry", {}).clear()


def forget_cached_meshes(device_type: str) -> None:
    """Have DTensor look again at how operators divide, in this thread and in that of backward on the current device.

    It takes meshes of one shape for one mesh, whatever their groups are, and gives what an operator returns the mesh
    that it met first: one of groups that were left, or that lack a backend.

    Replaced by meshes that are equal only where their groups are, or a public way to clear these caches.
    """
    import torch
    from torch.distributed.tensor import DTensor, debug

    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    # Not in torch 2.11.
    clear = getattr(debug, "_clear_sharding_prop_cache", propagator.propagate_op_sharding.cache.cache_clear)

    class Clearing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Any) -> Any:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            clear()
            return gradient

    clear()
    with torch.enable_grad():
        seen: Any = Clearing.apply(torch.zeros((), device=device_type, requires_grad=True))  # type: ignore[no-untyped-call]
    torch.autograd.backward(seen)


def abort_process_groups() -> None:
    """Close all nccl communicators of this process without waiting for the collectives under way.

    Replaced by a public `torch.distributed.abort_process_group`; the public `destroy_process_group` waits.
    """
    from torch.distributed.distributed_c10d import _abort_process_group

    _abort_process_group()


def calls_collective(frame: FrameType) -> bool:
    """Whether the innermost frame of a thread that stands still is in a collective, or waits for one.

    What a function around a collective does besides is called by another frame: FSDP's step, DTensor's rules, a wrapper
    of the user's. Replaced by a public way to ask a process group whether a thread waits for its peers.
    """
    import torch
    from torch.distributed import _functional_collectives, distributed_c10d

    filename = frame.f_code.co_filename
    if filename == torch._ops.__file__:
        # Of an operator, or of what its overloads have in common: the namespace comes first.
        return str(frame.f_locals.get("self")).partition(".")[0] in _OPERATORS
    if filename in (distributed_c10d.__file__, _functional_collectives.__file__):
        return True
    root = f"{Path(torch.__file__).parent}/"
    if filename.startswith(root) and not filename.startswith(f"{root}distributed/"):
        # As torch.futures, whose `wait` may be for any kind of work.
        return False
    return _waits_for_work(frame)


_OPERATORS = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"})


def _waits_for_work(frame: FrameType) -> bool:
    """Whether `frame` calls `wait` of a collective's Work, without a limit: of one that it names, or without a name."""
    import torch.distributed as dist

    before = [one for one in dis.get_instructions(frame.f_code) if one.offset <= frame.f_lasti]
    if not before or "CALL" not in before.pop().opname:
        return False
    while before and before[-1].opname in ("PRECALL", "CACHE", "PUSH_NULL"):
        before.pop()
    if not before or before[-1].opname not in ("LOAD_METHOD", "LOAD_ATTR") or before.pop().argval != "wait":
        return False
    names = before[-1].argval if before and before[-1].opname.startswith(_LOADS) else None
    name = names[-1] if isinstance(names, tuple) else names
    for held in (frame.f_locals, frame.f_globals):
        if name in held:
            return isinstance(held[name], dist.Work)
    return True


_LOADS = ("LOAD_FAST", "LOAD_NAME", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF", "STORE_FAST_LOAD_FAST")


def is_of_group(frame: FrameType) -> bool:
    """Whether `frame` is in what FSDP2 gathers and reduces, outside of which no user's code runs.

    Replaced as `calls_collective`.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

    return frame.f_code.co_filename in (_fsdp_collectives.__file__, _fsdp_param_group.__file__)


def all_gather_tensor(output: Any, tensor: Any, group: Any = None) -> None:
    """Gather every rank's `tensor` into `output`, one after the other; None is the default process group.

    Replaced by `torch.distributed.all_gather_single` alone once the oldest supported torch has it; torch 2.13 warns of
    the name that torch 2.11 has.
    """
    import torch.distributed as dist

    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, tensor, group=group)


def reduce_scatter_tensor(output: Any, tensor: Any, group: Any = None) -> None:
    """Sum `tensor` over the ranks, each keeping its part in `output`; None is the default process group.

    Replaced by `torch.distributed.reduce_scatter_single` alone, as `all_gather_tensor`.
    """
    import torch.distributed as dist

    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(output, tensor, group=group)


def ignore_parameters(module: Any, names: list[str]) -> None:
    """Let a DistributedDataParallel that `module` is given to leave its parameters of these names alone.

    Replaced by a public argument of DistributedDataParallel.
    """
    from torch.nn.parallel import DistributedDataParallel

    if names:
        wrapper: Any = DistributedDataParallel
        wrapper._set_params_and_buffers_to_ignore_for_model(module, names)


def forget_forward(module: Any) -> None:
    """Let FSDP2 not take the `forward` of `module`, which `fully_shard` was applied to, for its forward any more.

    Replaced by a public way to name the methods that count; `register_fsdp_forward_method` only adds one.
    """
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(module)  # type: ignore[attr-defined]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def become_root(module: Any, beside: Any = ()) -> None:
    """Make `module`, which `fully_shard` was applied to, the root of the groups inside it, and of those of the modules
    `beside` it, without gathering anything.

    Replaced by a public way to say so; else it is the first whose forward runs, which gathers its parameters.
    """
    from torch.distributed.fsdp import fully_shard

    names = [f"_largescale_beside_{index}" for index, _ in enumerate(beside)]
    for name, one in zip(names, beside, strict=True):
        module.add_module(name, one)
    try:
        fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]
    finally:
        for name in names:
            delattr(module, name)


def undo_sharding(module: Any) -> None:
    """Make `module`, which `fully_shard` was applied to, one that it was not applied to; parameters stay as they are.

    Replaced by a public inverse of `fully_shard`.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(module)  # type: ignore[attr-defined]
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]:
        if group is not None:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
            # Else a plain parameter is taken for a shard once the module loads a state.
            handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    del _module_state_mapping[module]
    for key in (STATE_KEY, REGISTRY_KEY):
        vars(module).pop(key, None)
    module.__class__ = type(module).__mro__[2]
    for part in module.modules():
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(part).pop(name, None)


@contextmanager
def without_gathering(module: Any) -> Iterator[None]:
    """Within, a forward of `module`, which `fully_shard` was applied to, uses the parameters that it finds there.

    Replaced by a public switch of FSDP2 for a block of code, as FSDP1 had `summon_full_params`.
    """
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(module)  # type: ignore[attr-defined]
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
    """Within, the group of `module`, which `fully_shard` was applied to, has its shards among the module's parameters
    where it is gathered; what was gathered stays in memory.

    Replaced by a public way to reach the sharded parameters, which have the gradients, of what is gathered.
    """
    from torch.distributed.fsdp import fully_shard

    group = fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]
    gathered = group.fsdp_params if group is not None and group.is_unsharded else []
    for one in gathered:
        one._setattr_on_modules(one.sharded_param)
    try:
        yield
    finally:
        # Unless something within has resharded it.
        for one in gathered if group is not None and group.is_unsharded else []:
            one._setattr_on_modules(one.unsharded_param)


def sharding_attributes() -> set[str]:
    """Names of what `fully_shard` puts among a module's attributes.

    Replaced by a public way to take the sharding off a module or its copy.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return {STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"}


def gather_for_backward_of(block: Any, tensors: list[Any]) -> None:
    """Have the backward of `tensors`, of the output of `block`, gather it, where FSDP2 has not seen to that.

    Replaced by requiring a torch that looks into dataclasses, as 2.13 does and 2.11 does not.
    """
    from torch.distributed.fsdp import _common_utils, fully_shard

    if hasattr(_common_utils, "collect_grad_tensors"):
        return
    for tensor in tensors:
        tensor.register_hook(fully_shard.state(block)._pre_backward)  # type: ignore[attr-defined]


def is_of_sharding(hook: Any) -> bool:
    """Whether `hook`, of a tensor's gradient, is FSDP2's, which takes it for a sign and returns it as it is.

    Replaced by a public way to tell when a module's backward begins.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    return isinstance(getattr(hook, "__self__", None), FSDPState)


def forget_sharded_step(module: Any) -> None:
    """Let FSDP2 forget the step of `module`, the root, that was under way: gradients not yet reduced are dropped.

    Replaced by `FSDPModule.reset_iter_state` alone, were it to drop gradients of gathered parameters; torch 2.11 has
    no such method.
    """
    from torch.distributed.fsdp import fully_shard

    root = fully_shard.state(module)  # type: ignore[attr-defined]
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


def shards_of(module: Any) -> list[tuple[Any, Any]]:
    """The parameters of the group of `module`, which `fully_shard` was applied to, each with the flat memory of this
    rank's shard, padded to the size of the largest.

    Replaced by a public way to say where the memory of a shard lies.
    """
    from torch.distributed.fsdp import fully_shard

    group = fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]
    return [] if group is None else [(one.sharded_param, one._sharded_param_data) for one in group.fsdp_params]


def place_shard(module: Any, parameter: Any, memory: Any) -> None:
    """Let the shard of `parameter`, of the group of `module`, be `memory`: flat, with its values and padding.

    Replaced as `shards_of`.
    """
    from torch.distributed.fsdp import fully_shard

    group = fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]
    found = next(one for one in group.fsdp_params if one.sharded_param is parameter)
    local = parameter._local_tensor
    found._sharded_param_data = memory
    parameter._local_tensor = memory[: local.numel()].view(local.shape)


def divided_as(like: Any, local: Any) -> Any:
    """`local`, this rank's part, as a tensor divided as the DTensor `like` is, and as large; it stays where it is.

    Replaced by `DTensor.from_local`, which copies what is in DRAM to a device that the mesh is of.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    made: Any = DTensor
    return made(local, DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta), requires_grad=False)


def when_gathered(module: Any, parameter: Any, made: Any, dims: Any = None) -> None:
    """Call `made` with the full parameter that the shard `parameter`, of the group of `module`, is gathered to, once
    when it is made; its dimensions lie in memory in the order of `dims`, the outermost first, where that is given.

    A parameter in another order is gathered contiguously and copied, and what was gathered is freed.

    Replaced by parameters of any strides in FSDP2, and a hook on what it gathers.
    """
    import torch
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    group = fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]
    found = next(one for one in group.fsdp_params if one.sharded_param is parameter)
    own: Any = found.init_unsharded_param
    kept: list[tuple[Any, Any]] = []

    def reorder(full: Any) -> Any:
        contiguous = full.to_local() if isinstance(full, DTensor) else full
        ordered = torch.empty_permuted(contiguous.shape, dims, dtype=contiguous.dtype, device=contiguous.device)
        kept.append((contiguous.detach(), ordered))
        found._unsharded_inner_tensors = [ordered]
        placed = ordered if contiguous is full else DTensor.from_local(ordered, full.device_mesh, full.placements)
        return torch.nn.Parameter(placed, requires_grad=full.requires_grad)

    def init_unsharded_param() -> None:
        first = not hasattr(found, "_unsharded_param")
        own()
        if dims is not None:
            if first:
                found._unsharded_param = reorder(found._unsharded_param)
            ((contiguous, ordered),) = kept
            ordered.untyped_storage().resize_(ordered.numel() * ordered.element_size())
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((ordered,)):  # type: ignore[attr-defined]
                ordered.copy_(contiguous)
            for gathered in found.all_gather_outputs:
                gathered.untyped_storage().resize_(0)
        if first:
            made(found._unsharded_param)

    found.init_unsharded_param = init_unsharded_param


def around_gathers(module: Any, before: Any = lambda: None, after: Any = lambda: None, bring: Any = None) -> Any:
    """Call `before` whenever the group of `module`, which `fully_shard` was applied to, is about to be gathered, and
    `after` when it has been; what undoes it.

    `bring` is called with the flat memory of each of the group's shards, and is a context in which there are copies of
    them on the device: once a gather, when FSDP2 would make its own of shards that are in DRAM, until it has read them.

    Replaced by public hooks of FSDPModule.unshard, which its own hooks do not call.
    """
    from torch.distributed.fsdp import fully_shard

    group = fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]
    before_ours = {name: vars(group).get(name) for name in ("unshard", "wait_for_unshard")}
    unshard, wait = group.unshard, group.wait_for_unshard

    def unshard_after(*args: Any, **kwargs: Any) -> None:
        if group._all_gather_result is None and not group.is_unsharded:
            before()
        with _bringing(group, bring):
            unshard(*args, **kwargs)

    def wait_before() -> None:
        begun = group._all_gather_result is not None
        # On a mesh of one rank it is here that FSDP2 reads the shards.
        with _bringing(group, bring if begun else None):
            wait()
        if begun:
            after()

    group.unshard, group.wait_for_unshard = unshard_after, wait_before

    def undo() -> None:
        for name, method in before_ours.items():
            if method is None:
                delattr(group, name)
            else:
                setattr(group, name, method)

    return undo


class _Shard:
    """In the place of a shard's memory while FSDP2 asks for it on its device."""

    def __init__(self, memory: Any, copies: Any, index: int) -> None:
        self.memory, self._copies, self._index = memory, copies, index

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """Its copy."""
        return self._copies()[self._index]


@contextmanager
def _bringing(group: Any, bring: Any) -> Iterator[None]:
    shards = [] if bring is None else [(one, one._sharded_param_data) for one in group.fsdp_params]
    # What is around a gather may gather the group itself, on another stream.
    memories = [memory.memory if isinstance(memory, _Shard) else memory for _, memory in shards]
    with ExitStack() as until_read:
        copies = functools.cache(lambda: until_read.enter_context(bring(memories)))
        for index, (one, memory) in enumerate(shards):
            until_read.callback(setattr, one, "_sharded_param_data", memory)
            one._sharded_param_data = _Shard(memories[index], copies, index)
        yield


def around_reductions(module: Any, reduced: Any) -> Any:
    """Call `reduced` whenever gradients of the group of `module`, which `fully_shard` was applied to and whose shards
    are in DRAM beside a CUDA device, have been reduced, with their parameters and a function that waits for their
    copies to DRAM; what undoes it. Those that no hook waits for are copied beside what computes.

    Replaced by a public hook of FSDPModule's reduction, and by pinned gradients whatever memory the shards are in.
    """
    from torch.distributed.fsdp import fully_shard

    group = fully_shard.state(module)._fsdp_param_group  # type: ignore[attr-defined]
    before_ours, post_backward = vars(group).get("post_backward"), group.post_backward

    def reduce(*args: Any) -> None:
        before = [(one, one.pin_memory, _written(one.sharded_param)) for one in group.fsdp_params]
        for one, _, _ in before:
            # Those whom torch tells of a gradient read it at once.
            one.pin_memory = not getattr(one.sharded_param, "_post_accumulate_grad_hooks", None)
        try:
            post_backward(*args)
        finally:
            for one, pinned, _ in before:
                one.pin_memory = pinned
        fresh = [one for one, _, known in before if _written(one.sharded_param) != known]
        events = [one.grad_offload_event for one in fresh if one.grad_offload_event is not None]
        if fresh:
            reduced([one.sharded_param for one in fresh], lambda: [event.synchronize() for event in events])

    group.post_backward = reduce

    def undo() -> None:
        if before_ours is None:
            del group.post_backward
        else:
            group.post_backward = before_ours

    return undo


def _written(parameter: Any) -> tuple[int, int] | None:
    """What tells the gradient of a shard from another, and from itself before it was added to."""
    from torch import Tensor

    # Not what a subclass of the package says it is.
    descriptor: Any = Tensor.grad
    gradient = descriptor.__get__(parameter)
    return None if gradient is None else (id(gradient), getattr(gradient, "_local_tensor", gradient)._version)


def differentiate_placing_twice() -> None:
    """Let second derivatives pass through `DTensor.from_local`, where its gradient is placed otherwise than its input.

    torch redistributes such a gradient without a graph, so that what depends on it has a wrong gradient, and nothing
    is said; so in each of its styles of tensor parallelism that takes a local tensor. For the life of the process.

    Replaced by a differentiable redistribution in torch, whose comment there announces it.
    """
    import torch
    from torch.distributed.tensor import _api

    function: Any = _api._FromTorchTensor
    plain = function.backward
    if getattr(plain, "differentiates", False):
        return

    def backward(ctx: Any, gradient: Any) -> Any:
        if gradient is not None and torch.is_grad_enabled() and gradient.requires_grad:
            # torch 2.11 may have neither, and places a gradient as the input was.
            normalize = getattr(_api, "_normalize_placements_for_grad", tuple)
            placements = getattr(ctx, "grad_placements", None) or normalize(ctx.forward_input_placements)
            gradient = gradient.redistribute(ctx.forward_input_device_mesh, placements)
        return plain(ctx, gradient)

    backward.differentiates = True  # type: ignore[attr-defined]
    function.backward = staticmethod(backward)
