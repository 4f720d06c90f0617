"""Price of the offload of parameters: groups in other tiers, and their shards in flight.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.price import Moment, Price
from lightning_largescale.tiers import group_tiers

if TYPE_CHECKING:
    from lightning_largescale.planner.sizes import Sizes


class ParameterOffloadPrice(Price):
    """Groups whose parameters, and gradients with them, are in another tier while they do not compute."""

    @override
    def place(self, sizes: Sizes) -> None:
        if sizes.plan.offload_parameters is None:
            return
        sizes.placement.groups = group_tiers(sizes.plan, {name: sizes.shard(name) for name in sizes.movable})
        # Unsharded gradients have no place between micro-batches.
        sizes.reductions = sizes.accumulate

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Mapping[str, int | Sequence[int]]:
        if not sizes.placement.groups or moment in ("setup", "optimizer step"):
            return {}
        return {"parameters in flight": parameters_in_flight(sizes, backward=moment != "forward")}

    @override
    def staging(self, sizes: Sizes) -> int:
        # Every buffer has the size of the largest shard.
        shards = [sizes.shard(name) for name, tier in sizes.placement.groups.items() if tier == "nvme"]
        return (sizes.plan.prefetched_blocks + 1) * max(shards, default=0)


def parameters_in_flight(sizes: Sizes, *, backward: bool) -> list[int]:
    """Return, for each segment, the bytes of parameter shards that are prefetched into the device's memory.

    They are the shard of the group that computes, until it has been all-gathered, and those of the next groups to
    fetch. On CUDA prefetched shards wait in DRAM. Only a group gathered from a single rank is on the device twice,
    while the segment holds less than at its peak.
    """
    if sizes.kind != "cpu":
        return [_copied_alone(sizes, index, backward=backward) for index in range(len(sizes.blocks))]
    groups, most = sizes.placement.groups, sizes.plan.prefetched_blocks + 1
    ahead: list[str] = []
    found: list[int] = []
    for block in sizes.blocks if backward else sizes.blocks[::-1]:
        if block in groups and ahead[:1] != [block]:
            ahead = [str(block), *(name for name in ahead if name != block)][:most]
        found.append(sum(map(sizes.shard, ahead)))
    return found if backward else found[::-1]


def _copied_alone(sizes: Sizes, index: int, *, backward: bool) -> int:
    block, segment = sizes.blocks[index], sizes.step.segments[index]
    kept = backward and not sizes.gathers_again
    if block not in sizes.placement.groups or sizes.gather_ranks > 1 or kept:
        return 0
    rise = segment.forward_peak_bytes - segment.forward_entry_bytes
    if backward:
        rise = segment.backward_peak_bytes - segment.backward_entry_bytes + sizes.own_gradient(index)
    return max(0, sizes.shard(block) - max(0, rise))
