"""Unsharding of a sharded module, for a block of code or permanently.

Every rank then holds all parameters, so they must fit into its memory.

Source: torch.distributed.tensor, DTensor.full_tensor; FSDP1's `summon_full_params` for the block of code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.parallel.average import average_in_place
from lightning_largescale.parallel.copies import disable_copies
from lightning_largescale.parallel.gather import stop_gathering
from lightning_largescale.parallel.order import divided, full, order_of, whole_of
from lightning_largescale.parallel.sharded import Sharded, meet, reshard, sharded_state
from lightning_largescale.parallel.tensor import compute_plainly


@contextmanager
def whole_parameters(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which `module` has full plain parameters, with writes into them kept: a collective.

    They are copies on `device`, wherever the shards are. Each rank keeps its own shards of the block's writes, so all
    ranks must write the same values. Inside a step they are read-only: a loss computed from them is differentiated
    as in a plain run, with a separate reduction.

    Args:
        module: Any module; one that is not sharded stays unchanged.
        device: The device that the module computes on.
    """
    state = sharded_state(module)
    if state is None or state.whole:
        yield
        return
    if not state.stepping:
        reshard(module)
    places = _shards(module)
    if state.stepping:
        # Parameters of unsharded blocks are not DTensors, and are left out.
        meet(module, *(number for number, one in enumerate(module.parameters()) if isinstance(one, DTensor)))
    shards = dict.fromkeys(shard for _, _, shard in places)
    whole = {
        shard: _differentiable(shard, state, number, device) if state.stepping else _full(shard, device)
        for number, shard in enumerate(shards)
    }
    with contextlib.ExitStack() as gathering:
        for group in state.groups.values():
            gathering.enter_context(compat.without_gathering(group))
        state.whole = True
        _put(places, whole)
        try:
            yield
        finally:
            state.whole = False
            _put(places, {shard: shard for shard in shards})
            # Always copy back: writes through `.data` do not change the version, so they cannot be detected.
            for shard, values in whole.items() if not state.stepping else ():
                _write(shard, values)


def make_whole(module: nn.Module) -> Mapping[Tensor, nn.Parameter]:
    """Undo the sharding of `module`: full plain parameters on the CPU, equal on all ranks, without FSDP hooks.

    A collective. Optimizers of the shards no longer affect the module. A module that is not sharded stays unchanged. On
    a single rank the shard is the full parameter, and its memory is kept.

    Returns:
        The full parameter of each shard.
    """
    state = sharded_state(module)
    if state is None:
        return {}
    made: dict[Tensor, nn.Parameter] = {}
    reshard(module)
    shards = _shards(module)
    disable_copies(module)
    compute_plainly(module)
    for group in reversed(state.every_group()):
        compat.undo_sharding(group)
    stop_gathering(module, state)
    # One after the other, so that a shard is freed before the next full tensor is allocated.
    while shards:
        shard = shards[-1][2]
        owners = [entry for entry in shards if entry[2] is shard]
        shards = [entry for entry in shards if entry[2] is not shard]
        made[shard] = _full(shard, torch.device("cpu"), keep=True)
        _put(owners, {shard: made[shard]})
    return made


def _shards(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return each (submodule, parameter name, shard) of the module; tied shards appear several times."""
    places = [
        (part, name, parameter) for part in module.modules() for name, parameter in compat.own_tensors(part)[0].items()
    ]
    return [place for place in places if isinstance(place[2], DTensor)]


def _full(shard: nn.Parameter, device: torch.device, *, keep: bool = False) -> nn.Parameter:
    """Return the full parameter of `shard`; with `keep`, a single rank reuses the shard's memory."""
    assert isinstance(shard, DTensor)
    if keep and shard.device_mesh.size() == 1:
        return whole_of(shard).parameter(shard.to_local().detach(), shard)
    with torch.no_grad():
        # A copy, since on a single rank the full tensor shares the shard's memory, and writes would apply twice.
        return whole_of(shard).parameter(full(shard, order_of(shard)).to(device, copy=True), shard)


def _differentiable(shard: nn.Parameter, state: Sharded, number: int, device: torch.device) -> Tensor:
    """Return the full tensor of `shard`, number `number`, whose gradient is averaged over the ranks, as in a step."""
    return _Averaged.apply(shard, state, number, device)  # type: ignore[no-any-return, no-untyped-call]


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: nn.Parameter, state: Sharded, number: int, device: torch.device) -> Tensor:
        ctx.shard, ctx.state, ctx.number = shard, state, number
        return whole_of(shard).laid_out(full(shard, order_of(shard)).to(device, copy=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        shard = ctx.shard
        if ctx.state.agreement is not None:
            ctx.state.agreement.meet(ctx.number)
        average = gradient.clone(memory_format=torch.contiguous_format)
        average_in_place(average)
        if gradient.is_cuda:
            # FSDP2 adds it to what it reduces, and copies to DRAM, on its own streams until the backward ends.
            torch.cuda.synchronize(gradient.device)
        return divided(average, shard, order_of(shard)), None, None, None


def _put(places: list[tuple[nn.Module, str, nn.Parameter]], by: Mapping[nn.Parameter, Tensor]) -> None:
    for part, name, shard in places:
        compat.own_tensors(part)[0][name] = by[shard]


def _write(shard: nn.Parameter, whole: Tensor) -> None:
    assert isinstance(shard, DTensor)
    with torch.no_grad():
        shard.copy_(divided(whole.detach(), shard, order_of(shard)))
