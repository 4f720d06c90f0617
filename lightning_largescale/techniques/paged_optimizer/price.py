"""Price of optimizer state in pages: where it is kept, and the buffers and temporaries of its step.

Source: Dettmers et al. 2023, "QLoRA", section 3 (paged optimizers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.paging import largest_page, page_buffers, temporaries
from lightning_largescale.planner.placement import state_that_may_stay, state_without_pages, whole_pages
from lightning_largescale.planner.price import Fields, Moment, Price, Terms
from lightning_largescale.planner.remedy import Assigned, Remedy, Removable, WorstMoment
from lightning_largescale.tiers import PAGE_BUFFERS, PAGE_BYTES, aligned

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.offload_search import Offloading
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload

# Classes of torch's optimizers that have a fused kernel on the CPU, which runs at the rate of the host's memory.
FUSED_NAMES = {"Adam", "AdamW", "SGD", "Adagrad"}


class PageRemedy(Remedy):
    """Pages of optimizer state that leave the device."""

    name = "optimizer"
    unit = "pages"

    @override
    def may_help(self, plan: Plan, search: Offloading) -> bool:
        has_state = any(any(needs.state_bytes.values()) for needs in search.workload.optimizers)
        return search.has_tiers and search.workload.stage == "fit" and has_state

    @override
    def fields(self, sizes: Sizes, assigned: Assigned) -> Fields:
        in_dram, on_disk = assigned.state_in_dram, assigned.state_on_disk
        if not in_dram and not on_disk:
            return {}
        return {
            "offload_optimizer": "nvme" if on_disk else "cpu",
            "resident_optimizer_bytes": assigned.state_bytes or None,
            "cpu_optimizer_bytes": (in_dram or None) if on_disk else None,
        }

    @override
    def fields_of_all(self, workload: Workload, tier: str) -> Fields:
        return {"offload_optimizer": tier}

    @override
    def removable(self, worst: WorstMoment) -> Removable:
        # On CUDA the host may step on the state: then parameters come back instead, unless they are offloaded too.
        reads = 1.0
        if worst.kind != "cpu":
            reads = 0.0 if worst.moves_groups else _parameters_of_state(worst.workload)
        return worst.terms.get("optimizer state", 0), min(1.0, reads), 1.0

    @override
    def most_staging(self, sizes: Sizes, groups: Sequence[str], blocks: Sequence[str]) -> int:
        return PAGE_BUFFERS * largest_page(sizes)

    @override
    def steppers(self, sizes: Sizes) -> tuple[bool, ...]:
        known = {needs.class_name for needs in sizes.workload.optimizers} <= FUSED_NAMES
        return (False, True) if sizes.kind == "cuda" and known and not sizes.plan.scales_gradients else (False,)

    @override
    def stepper_fields(self, *, by_host: bool) -> Fields:
        return {"cpu_optimizer_step": by_host}


class PagedOptimizerPrice(Price):
    """Optimizer state that is paged in and out around each step."""

    passing_terms = ("optimizer temporaries",)
    remedies = (PageRemedy(),)

    @override
    def place(self, sizes: Sizes) -> None:
        sizes.pages_state = sizes.plan.offload_optimizer is not None
        sizes.host_steps = sizes.plan.cpu_optimizer_step
        if sizes.workload.stage == "fit":
            sizes.placement.state = _state_tiers(sizes)

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
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
        return _page_staging(sizes)


def _page_staging(sizes: Sizes) -> int:
    """Return the bytes of the page buffers in DRAM for state on a disk, and for parameters that the CPU steps on.

    State that stays in DRAM goes through no buffer.
    """
    if sizes.workload.stage != "fit":
        return 0
    place = sizes.placement
    on_disk = [name for name, tier in place.groups.items() if tier == "nvme"]
    copied = [name for name in sizes.stepped if sizes.host_steps and name not in place.groups]
    beside = sum(sizes.gradient(name, whole=False) for name in on_disk) * (1 if sizes.releases else 2)
    beside += 2 * sum(sizes.stepped[name][1] for name in copied)
    state, page = place.state.get("nvme", 0), largest_page(sizes)
    if not state:
        page = page * beside // max(1, beside + sum(map(sizes.state, [*on_disk, *copied])))
    total = aligned(state + beside)
    return min(PAGE_BUFFERS, -(-total // min(page, PAGE_BYTES))) * min(page, total) if total else 0


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


def _parameters_of_state(workload: Workload) -> float:
    """Return the smallest ratio of parameter bytes to optimizer-state bytes over all parameters with state."""
    state = {name: size for needs in workload.optimizers for name, size in needs.state_bytes.items() if size}
    return min((one.bytes / state[one.name] for one in workload.parameters if one.name in state), default=0.0)
