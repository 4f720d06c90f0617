"""Price of the offload of parameters: groups in other tiers, and their shards in flight.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.placement import gradient_staging
from lightning_largescale.planner.price import Fields, Moment, Price, Terms
from lightning_largescale.planner.remedy import UNLIMITED, Assigned, Remedy, Removable, WorstMoment
from lightning_largescale.tiers import group_tiers

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.offload_search import Offloading
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload


class ParameterRemedy(Remedy):
    """Groups of parameters that leave the device."""

    name = "parameters"
    unit = "groups"

    @override
    def may_help(self, plan: Plan, search: Offloading) -> bool:
        return search.has_tiers and bool(search.workload.blocks) and not search.workload.whole

    @override
    def moves_state(self, kind: str) -> bool:
        # The host steps on the parameters, where their state is too.
        return kind == "cuda"

    @override
    def fields(self, sizes: Sizes, assigned: Assigned) -> Fields:
        groups, in_dram = assigned.groups, assigned.groups_in_dram
        if not groups:
            return {}
        on_disk = len(in_dram) < len(groups)
        return {
            "offload_parameters": "nvme" if on_disk else "cpu",
            "resident_parameter_bytes": sum(map(sizes.shard, sizes.movable[len(groups) :])) or None,
            "cpu_parameter_bytes": (sum(map(sizes.shard, in_dram)) or None) if on_disk else None,
        }

    @override
    def fields_of_all(self, workload: Workload, tier: str) -> Fields:
        return {"offload_parameters": tier}

    @override
    def fields_of_none(self, tier: str) -> Fields:
        return {"offload_parameters": tier, "resident_parameter_bytes": UNLIMITED}

    @override
    def removable(self, worst: WorstMoment) -> Removable:
        fit = worst.workload.stage == "fit"
        fetched = worst.accumulate * (2.0 if fit and worst.plan.gathers_again else 1.0)
        trained = fit and all(one.trainable and one.used for one in worst.workload.parameters)
        # Gradients are offloaded with their parameters; a group's bytes then double.
        also = 0.0 if worst.frees_gradients else worst.terms.get("gradients", 0) * worst.holes
        each = 1 + (worst.holes if also else 0.0)
        # On CUDA the host steps on them.
        paged = 1.0 if trained and worst.kind == "cpu" else 0.0
        return worst.terms.get("parameters", 0) + also, (fetched + paged) / each, paged / each

    @override
    def most_staging(self, sizes: Sizes, groups: Sequence[str], blocks: Sequence[str]) -> int:
        return _shard_staging(sizes, groups) + gradient_staging(sizes, groups)


class ParameterOffloadPrice(Price):
    """Groups whose parameters, and gradients with them, are in another tier while they do not compute."""

    remedies = (ParameterRemedy(),)

    @override
    def place(self, sizes: Sizes) -> None:
        if sizes.plan.offload_parameters is None:
            return
        sizes.placement.groups = group_tiers(sizes.plan, {name: sizes.shard(name) for name in sizes.movable})
        # Unsharded gradients have no place between micro-batches.
        sizes.reductions = sizes.accumulate

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        if not sizes.placement.groups or moment in ("setup", "optimizer step"):
            return {}
        return {"parameters in flight": parameters_in_flight(sizes, backward=moment != "forward")}

    @override
    def staging(self, sizes: Sizes) -> int:
        groups = sizes.placement.groups
        on_disk = [name for name, tier in groups.items() if tier == "nvme"]
        return _shard_staging(sizes, on_disk) + gradient_staging(sizes, groups if sizes.releases else on_disk)


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
    kept = backward and not sizes.plan.gathers_again
    if block not in sizes.placement.groups or sizes.gather_ranks > 1 or kept:
        return 0
    rise = segment.forward_peak_bytes - segment.forward_entry_bytes
    if backward:
        rise = segment.backward_peak_bytes - segment.backward_entry_bytes + sizes.own_gradient(index)
    return max(0, sizes.shard(block) - max(0, rise))


def _shard_staging(sizes: Sizes, on_disk: Sequence[str]) -> int:
    """Return the bytes of the buffers in DRAM for shards of the groups `on_disk`, each as large as the largest."""
    return min(len(on_disk), sizes.plan.prefetched_blocks + 1) * max(map(sizes.shard, on_disk), default=0)
