"""What tensor parallelism divides of each repeated block of a module, found from what the step calls the block with."""

from __future__ import annotations

import contextlib
import dataclasses
import re
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

# Of all parameters: what has less outside of blocks is not worth its communication.
_LARGE_SHARE = 0.01


# Of the elements of matrices: so much more is reason to ask for another number of ranks.
_MUCH = 0.15


class _BlockCall(NamedTuple):
    """What a block was called with, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def divide_blocks(request: TraceRequest, sizes: tuple[int, ...], mode: Any) -> dict[int, dict[str, Divided]]:
    """What may be divided of each block of the module, by a number of ranks and the block's name; "" is the rest.

    Args:
        request: its module and batch hold fake tensors.
        sizes: numbers of ranks.
        mode: of the fake tensors, active.
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
                # They pass what a module is given, and returns, through an autograd function.
                why = "full backward hooks are registered inside the block"
            elif any(compat.is_compiled(part) for part in blocks[name].modules()):
                why = "torch.compile wraps a part of the block"
            if why is not None:
                divided[name] = Divided(whole={one: why for one, _ in blocks[name].named_parameters()})
                continue
            kind = (_kind(blocks[name], call), tuple(shared))
            # What is computed is right whatever is divided, so blocks that differ in numbers alone, as in their own,
            # need no run each.
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
    """Of the elements of matrices in blocks, those that are divided among `ranks`."""
    matrices = [p for p in workload.parameters if p.block in workload.blocks and len(p.shape) > 1]
    divided = {f"{block}.{name}" for block, found in workload.divisions.get(ranks, {}).items() for name in found.parts}
    total = sum(parameter.numel for parameter in matrices)
    return sum(parameter.numel for parameter in matrices if parameter.name in divided) / total if total else 0.0


def division_words(workload: Workload, ranks: int) -> str:
    """What `ranks` of tensor parallelism divide: the share of all parameters; and the matrices that stay whole."""
    found = workload.divisions.get(ranks, {})
    names = {f"{block}.{name}" if block else name for block, divided in found.items() for name in divided.parts}
    share = sum(one.numel for one in workload.parameters if one.name in names) / max(1, workload.numel)
    # Blocks that are alike, once.
    whole: dict[str, str] = {}
    for block, divided in found.items():
        for name, why in divided.whole.items():
            whole.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{block}.{name}" if block else name), why)
    words = "; ".join(f"{name} ({why})" for name, why in whole.items())
    return f"{share:.1%} of the parameters divided" + (f"; whole: {words}" if words else "")


def check_division(workload: Workload, others: Workload, ranks: int) -> None:
    """Make sure that `ranks` divide something, and nearly as much as another number would.

    Args:
        workload: of which it was looked for what `ranks` divide.
        others: the same, looked at with other numbers.
        ranks: what was asked for.

    Raises:
        PlanError: they divide nothing, or much less than another number would.
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
    """What may be divided of what lies outside of blocks: tables and heads of a vocabulary, by its entries."""
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
    """What the step returns, and what it gives blocks: they give what they gave before."""
    before: dict[str, Any] = {name: vars(block).get("forward") for name, block in blocks.items()}
    entering: list[Any] = []

    def forward_of(name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Blocks compute with whole inputs, so what is divided there would have to be gathered.
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
    """What the step calls each block with, the first time, and what it returns, as far as the step comes; in order."""
    given: dict[str, tuple[Any, Any]] = {}
    calls: dict[str, _BlockCall] = {}

    def before(name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in given:
                # What holds tensors may be written into once the block runs.
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
        # Without gradients, so that what the blocks are given can be copied with what holds it. Where the step fails
        # is known from tracing it; what was called before is known.
        with contextlib.suppress(Exception), torch.no_grad():
            _forward_of(request)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _given(tensor: Tensor) -> Tensor:
    """As a block is given it in training, when gradients are wanted of what is computed with parameters."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _settings(block: nn.Module) -> tuple[Any, ...]:
    """Attributes of the parts of a block that may decide what they compute, but for whole numbers."""
    return tuple(
        (path, name, value)
        for path, part in block.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | float | str | type(None))
    )


def _kind(block: nn.Module, call: _BlockCall) -> Any:
    """The same for blocks of which probably the same may be divided."""
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in block.named_parameters())
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in((call.args, call.kwargs)))
    return type(block), parameters, tensors
