"""Find what tensor parallelism shards in each repeated block, from the arguments that the step calls the block with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_largescale import compat
from lightning_largescale.arithmetic import lightning_plugin
from lightning_largescale.errors import PlanError
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.blocks import Group, find_groups
from lightning_largescale.workload.declared import declared_parts
from lightning_largescale.workload.shardable import Subject, copied, divide, divide_subject
from lightning_largescale.workload.steps import TraceRequest, call_step
from lightning_largescale.workload.tracker import MadeUpNumbers
from lightning_largescale.workload.workload import Divided, Workload

# Minimum share of all parameters: outside of blocks, a smaller matrix is not worth the communication.
_LARGE_SHARE = 0.01


# If another number of ranks shards so much more of the elements of matrices, `check_division` asks for it.
_MUCH = 0.15


class _BlockCall(NamedTuple):
    """The arguments that a block was called with, and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def divide_blocks(request: TraceRequest, sizes: tuple[int, ...], mode: Any) -> dict[int, dict[str, Divided]]:
    """Return what can be sharded of each block, by number of ranks, then by the block's name; "" is the rest.

    Args:
        request: the step to run; its module and batch hold fake tensors.
        sizes: the numbers of ranks to search for.
        mode: the fake tensor mode, which is active.
    """
    groups = find_groups(request.module)
    blocks = {name: group.modules[0] for name, group in groups.items() if name}
    calls = _calls(request, blocks)
    found: dict[int, dict[str, Divided]] = {ranks: {} for ranks in sizes}
    for ranks, divided in found.items():
        alike: dict[Any, Divided] = {}
        same: dict[Any, Divided] = {}
        for name, call in calls.items():
            shared = [shared.removeprefix(f"{name}.") for shared in groups[name].shared]
            why = None
            if compat.has_full_backward_hooks(blocks[name]):
                # Such hooks pass a module's inputs and outputs through an autograd function.
                why = "full backward hooks are registered inside the block"
            elif any(compat.is_compiled(part) for part in blocks[name].modules()):
                why = "torch.compile wraps a part of the block"
            if why is not None:
                divided[name] = Divided(whole={one: why for one, _ in blocks[name].named_parameters()})
                continue
            kind = (_kind(blocks[name], call), tuple(shared))
            # Every sharding computes the right result, so blocks that differ only in integer attributes, such as their
            # index, do not need a run each.
            own = (kind, repr(blocks[name]), _settings(blocks[name]))
            if own not in same:
                like = alike.get(kind)
                same[own] = divide(
                    blocks[name],
                    call.args,
                    call.kwargs,
                    ranks,
                    shared=shared,
                    mode=mode,
                    like=like,
                    declared=declared_parts(request.module, name),
                )
            divided[name] = same[own]
            alike.setdefault(kind, divided[name])
        divided[""] = _rest(request, groups, calls, ranks, mode)
    return found


def share_divided(workload: Workload, ranks: int) -> float:
    """Return the share of the elements of matrices in blocks that is sharded among `ranks`."""
    matrices = [p for p in workload.parameters if p.block in workload.blocks and len(p.shape) > 1]
    divided = {f"{block}.{name}" for block, found in workload.divisions.get(ranks, {}).items() for name in found.parts}
    total = sum(parameter.numel for parameter in matrices)
    return sum(parameter.numel for parameter in matrices if parameter.name in divided) / total if total else 0.0


def check_division(workload: Workload, others: Workload, ranks: int) -> None:
    """Check that `ranks` shard something, and nearly as much as another number of ranks would.

    Args:
        workload: the workload, with divisions for `ranks`.
        others: the same workload, with divisions for other numbers of ranks.
        ranks: the requested number of ranks.

    Raises:
        PlanError: `ranks` shard nothing, or much less than another number would.
    """
    share = share_divided(workload, ranks)
    better = [size for size in others.divisions if share_divided(others, size) > share + _MUCH]
    if share and not better:
        return
    whys = [
        f"{block}.{name}: {why}"
        for block, found in workload.divisions.get(ranks, {}).items()
        for name, why in found.whole.items()
        if block
    ]
    why = f" ({whys[0]})" if whys else f" ({'; '.join(workload.approximate) or 'it has no repeated blocks'})"
    nearest = min(better, key=lambda size: (abs(size - ranks), size), default=1)
    raise PlanError(
        f"tp={ranks} leaves {1 - share:.0%} of the matrices of {workload.name}'s blocks whole{why}; the nearest that"
        f" divides more is tp={nearest}, or give a tensor_parallel_plan."
        if better
        else f"tp={ranks} divides nothing of {workload.name}{why}; use tp=1, or give a tensor_parallel_plan."
    )


def _rest(
    request: TraceRequest, groups: Mapping[str, Group], calls: Mapping[str, _BlockCall], ranks: int, mode: Any
) -> Divided:
    """Return what can be sharded outside of blocks: tables and heads of a vocabulary, by entries."""
    module = request.module
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    own, in_blocks = {*groups[""].parameters}, {name for group in groups.values() for name in group.shared}
    whole = {name: "it belongs to a block" for name in sizes if name not in own}
    large = _LARGE_SHARE * sum(sizes.values())
    whole |= {name: "it is small" for name in own if sizes[name] < large and module.get_parameter(name).dim() > 1}
    whole |= dict.fromkeys(in_blocks & own, "blocks use it as well")
    if not own - whole.keys():
        return Divided()
    blocks = {name: group.modules[0] for name, group in groups.items() if name in calls}

    def subject() -> Subject:
        others = [*module.buffers(), *tensors_in(request.batch)]
        return Subject(dict(module.named_parameters()), others, lambda: _step_without(request, blocks, calls))

    found = divide_subject(subject, ranks, whole, mode, uneven=True)
    return dataclasses.replace(found, whole={name: why for name, why in found.whole.items() if name in own})


def _step_without(request: TraceRequest, blocks: Mapping[str, nn.Module], calls: Mapping[str, _BlockCall]) -> Any:
    """Return the step's result and the tensors that it passes to blocks; each block returns its recorded output."""
    before: dict[str, Any] = {name: vars(block).get("forward") for name, block in blocks.items()}
    entering: list[Any] = []

    def forward_of(name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Blocks compute with unsharded inputs, so a shard passed to one would have to be all-gathered.
            entering.extend(tensors_in((args, kwargs)))
            return copied(calls[name].output)

        return forward

    try:
        for name, block in blocks.items():
            block.forward = forward_of(name)
        return _forward_of(request), entering
    finally:
        for name, block in blocks.items():
            del block.forward
            if before[name] is not None:
                block.forward = before[name]


def _forward_of(request: TraceRequest) -> Any:
    with MadeUpNumbers(), lightning_plugin(request.precision, request.device_type).forward_context():
        return call_step(request)


def _calls(request: TraceRequest, blocks: Mapping[str, nn.Module]) -> dict[str, _BlockCall]:
    """Record the first call of each block in the step, in order, up to where the step fails."""
    given: dict[str, tuple[Any, Any]] = {}
    calls: dict[str, _BlockCall] = {}

    def before(name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in given:
                # The block may write into the containers of its tensors.
                given[name] = copied(map_tensors((args, kwargs), _given))

        return hook

    def after(name: str) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            calls.setdefault(name, _BlockCall(*given[name], copied(map_tensors(output, _given))))

        return hook

    handles = []
    for name, block in blocks.items():
        if compat.compiled_module(block) is block:
            handles.append(block.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(block.register_forward_hook(after(name)))
    try:
        # Without gradients, so that the arguments can be copied together with their containers. Tracing reports where
        # the step fails; the calls before that are recorded.
        with contextlib.suppress(Exception), torch.no_grad():
            _forward_of(request)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _given(tensor: Tensor) -> Tensor:
    """Return `tensor` as a block receives it in training: a floating-point tensor requires a gradient."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _settings(block: nn.Module) -> tuple[Any, ...]:
    """Return the attributes of a block's modules that may decide what they compute, except integers."""
    return tuple(
        (path, name, value)
        for path, part in block.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | float | str | type(None))
    )


def _kind(block: nn.Module, call: _BlockCall) -> Any:
    """Return a key that is equal for blocks of which probably the same can be sharded."""
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in block.named_parameters())
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in((call.args, call.kwargs)))
    return type(block), parameters, tensors
