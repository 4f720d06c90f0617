"""Price of optimizer state in pages: where it is kept, and the buffers and temporaries of its step.

Source: Dettmers et al. 2023, "QLoRA", section 3 (paged optimizers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.paging import largest_page, moved_in_step, page_buffers, temporaries
from lightning_largescale.planner.placement import state_that_may_stay, state_without_pages, whole_pages
from lightning_largescale.planner.price import Moment, Price
from lightning_largescale.tiers import page_buffer_bytes

if TYPE_CHECKING:
    from lightning_largescale.planner.sizes import Sizes


class PagedOptimizerPrice(Price):
    """Optimizer state that is paged in and out around each step."""

    passing_terms = ("optimizer temporaries",)

    @override
    def place(self, sizes: Sizes) -> None:
        sizes.pages_state = sizes.plan.offload_optimizer is not None
        sizes.host_steps = sizes.plan.host_optimizer_step
        if sizes.workload.stage == "fit":
            sizes.placement.state = _state_tiers(sizes)

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Mapping[str, int | Sequence[int]]:
        if moment == "setup":
            return {}
        buffers = {"page buffers": page_buffers(sizes)}
        if moment != "optimizer step":
            return buffers
        # Released gradients have been stepped on already, except the root's.
        stepped = (None, "") if sizes.releases else sizes.stepped
        return {**buffers, "optimizer temporaries": temporaries(sizes, stepped)}

    @override
    def staging(self, sizes: Sizes) -> int:
        moved = moved_in_step(sizes)
        paged = sum(moved.values()) if sizes.host_steps else moved.get("nvme", 0)
        return page_buffer_bytes(paged, largest_page(sizes))


def _state_tiers(sizes: Sizes) -> dict[str, int]:
    plan, groups = sizes.plan, sizes.placement.groups
    if plan.offload_optimizer is None and not groups:
        return {}
    total, may_stay = sizes.optimizer_state, state_that_may_stay(sizes, groups)
    if plan.offload_optimizer is None:
        return {"cpu": total - may_stay} if total > may_stay else {}
    stuck = state_without_pages(sizes, groups)
    leaves = total - stuck - whole_pages(may_stay - stuck, plan.resident_optimizer_bytes)
    in_dram = leaves if plan.offload_optimizer == "cpu" else whole_pages(leaves, plan.cpu_optimizer_bytes)
    return {tier: size for tier, size in (("cpu", in_dram), ("nvme", leaves - in_dram)) if size}
