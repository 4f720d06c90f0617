"""Price of the offload of activations: what blocks saved is in another tier, or in flight.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.price import Fields, Moment, Price, Terms
from lightning_largescale.planner.remedy import Assigned, Remedy, Removable, WorstMoment
from lightning_largescale.tiers import REQUEST_BYTES, REQUESTS

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.offload_search import Offloading
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload

# Blocks whose activations are on their way out at once.
_BLOCKS_OUT = 2


class ActivationRemedy(Remedy):
    """Blocks whose activations leave the device."""

    name = "activations"
    unit = "blocks"

    @override
    def may_help(self, plan: Plan, search: Offloading) -> bool:
        return search.has_tiers and search.workload.stage == "fit" and bool(search.workload.blocks)

    @override
    def fields(self, sizes: Sizes, assigned: Assigned) -> Fields:
        if not assigned.blocks:
            return {}
        some = assigned.blocks if len(assigned.blocks) < len(sizes.workload.blocks) else None
        return {"offload_activations": assigned.blocks_tier, "offloaded_blocks": some}

    @override
    def fields_of_all(self, workload: Workload, tier: str) -> Fields:
        return {"offload_activations": tier}

    @override
    def removable(self, worst: WorstMoment) -> Removable:
        moves = worst.accumulate / worst.holes
        return worst.terms.get("activations", 0) * worst.holes, moves, moves

    @override
    def most_staging(self, sizes: Sizes, groups: Sequence[str], blocks: Sequence[str]) -> int:
        return _staging(sizes, sizes.saved_by(blocks))


class ActivationOffloadPrice(Price):
    """Tensors that blocks save, in another tier until their backward."""

    passing_terms = ("activations in flight",)
    remedies = (ActivationRemedy(),)

    @override
    def place(self, sizes: Sizes) -> None:
        if sizes.plan.offload_activations is None or sizes.workload.stage != "fit":
            return
        blocks = sizes.workload.blocks if sizes.plan.offloaded_blocks is None else sizes.plan.offloaded_blocks
        if blocks:
            sizes.placement.activations = sizes.plan.offload_activations
            sizes.placement.blocks = frozenset(blocks)

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        if sizes.placement.activations is None or moment in ("setup", "optimizer step"):
            return {}
        return {"activations in flight": activations_in_flight(sizes, backward=moment != "forward")}

    @override
    def staging(self, sizes: Sizes) -> int:
        return _staging(sizes, sizes.saved_elsewhere) if sizes.placement.activations == "nvme" else 0


def activations_in_flight(sizes: Sizes, *, backward: bool) -> list[int]:
    """Return, for each segment, the bytes of the previous blocks' saved activations that are in flight between tiers.

    Of two blocks on their way out, the first has left when the next block begins. On CUDA its memory is freed at once,
    so it adds only what exceeds the segment's rise to its peak.
    """
    most = sizes.plan.prefetched_blocks if backward else _BLOCKS_OUT
    last: list[int] = []
    found: list[int] = []
    for segment, leaving in zip(sizes.step.segments, sizes.leaving, strict=True):
        rise = segment.forward_peak_bytes - segment.forward_entry_bytes
        leaves = not backward and sizes.kind != "cpu" and segment.block is not None
        found.append(sum(last[:1]) + max(0, sum(last[1:]) - (rise if leaves else 0)))
        if segment.block is not None:
            last = [leaving, *last][:most]
    return found


def _staging(sizes: Sizes, saved: Sequence[int]) -> int:
    """Return the bytes in DRAM of activations on their way to a disk and back, of blocks that save `saved` bytes."""
    back = sum(sorted(saved, reverse=True)[: sizes.plan.prefetched_blocks + 1])
    return back + (REQUESTS * REQUEST_BYTES if back else 0)
