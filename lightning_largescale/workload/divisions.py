"""What tensor parallelism divides of each repeated block of a module, found from what the step calls the block with."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_largescale import compat
from lightning_largescale.arithmetic import lightning_plugin
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.blocks import find_groups
from lightning_largescale.workload.model import Divided
from lightning_largescale.workload.shardable import copied, divide
from lightning_largescale.workload.steps import Request, call_step

# The arguments that a block is called with.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def divide_blocks(request: Request, sizes: tuple[int, ...], mode: Any) -> dict[int, dict[str, Divided]]:
    """What may be divided of each block of the module, by a number of ranks and the block's name.

    Args:
        request: its module and batch hold fake tensors.
        sizes: numbers of ranks.
        mode: of the fake tensors, active.
    """
    module = request.module
    groups = {name: group for name, group in find_groups(module).items() if name}
    calls = _calls(request, {name: group.modules[0] for name, group in groups.items()})
    found: dict[int, dict[str, Divided]] = {ranks: {} for ranks in sizes}
    for ranks, blocks in found.items():
        alike: dict[Any, Divided] = {}
        for name, call in calls.items():
            block = groups[name].modules[0]
            shared = [shared.removeprefix(f"{name}.") for shared in groups[name].shared]
            key = _kind(block, call)
            blocks[name] = divide(block, *call, ranks, shared=shared, mode=mode, like=alike.get(key))
            alike.setdefault(key, blocks[name])
    return found


def _calls(request: Request, blocks: Mapping[str, nn.Module]) -> dict[str, _Call]:
    """What the step calls each block with, the first time, as far as it comes; by name, in the order of the calls."""
    calls: dict[str, _Call] = {}

    def note(name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                # What holds tensors may be written into once the block runs.
                calls[name] = copied(map_tensors((args, kwargs), _given))

        return hook

    handles = [block.register_forward_pre_hook(note(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        # Without gradients, so that what the blocks are given can be copied with what holds it. Where the step fails
        # is known from tracing it; what was called before is known.
        with (
            contextlib.suppress(Exception),
            torch.no_grad(),
            lightning_plugin(request.precision, request.device_type).forward_context(),
        ):
            call_step(request)
    finally:
        for handle in handles:
            handle.remove()
    return {name: call for name, call in calls.items() if compat.compiled_module(blocks[name]) is blocks[name]}


def _given(tensor: Tensor) -> Tensor:
    """As a block is given it in training, when gradients are wanted of what is computed with parameters."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _kind(block: nn.Module, call: _Call) -> Any:
    """The same for blocks of which probably the same may be divided."""
    parameters = tuple((name, one.shape, one.requires_grad) for name, one in block.named_parameters())
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in(call))
    return type(block), parameters, tensors
