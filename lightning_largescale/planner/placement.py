"""Which of a rank's bytes a plan keeps in which tier between their uses.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (what moves between device, CPU and NVMe).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_largescale.tiers import PAGE_BYTES, group_tiers

if TYPE_CHECKING:
    from lightning_largescale.planner.sizes import Sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where what leaves its place on the device is kept.

    Attributes:
        groups: by name of a group of parameters that leaves, its tier; those that stay are left out.
        state: by tier, bytes of optimizer state that leave.
        activations: tier of what `blocks` save; None: it stays.
        blocks: names of the blocks whose activations leave.
        outside: tiers that are not the device's own memory: on CPU, DRAM is.
        away: names of groups whose parameters are not in the device's memory.
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, int] = field(default_factory=dict)
    activations: str | None = None
    blocks: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    away: frozenset[str] = frozenset()

    @property
    def state_away(self) -> int:
        """Bytes of optimizer state that are not in the device's memory."""
        return sum(size for tier, size in self.state.items() if tier in self.outside)


def place(sizes: Sizes) -> Placement:
    """The placement of the plan that `sizes` are of."""
    plan = sizes.plan
    blocks: frozenset[str] = frozenset()
    if plan.offload_activations is not None and sizes.workload.stage == "fit":
        blocks = frozenset(sizes.workload.blocks if plan.offloaded_blocks is None else plan.offloaded_blocks)
    groups = group_tiers(plan, {name: sizes.shard(name) for name in sizes.movable})
    outside = frozenset({"nvme"} if sizes.kind == "cpu" else {"cpu", "nvme"})
    return Placement(
        groups=groups,
        away=frozenset(name for name, tier in groups.items() if tier in outside),
        state=_state_tiers(sizes, groups),
        activations=plan.offload_activations if blocks else None,
        blocks=blocks,
        outside=outside,
    )


def whole_pages(total_bytes: int, amount_bytes: int | None) -> int:
    """Of `total_bytes`, those in as many whole pages as `amount_bytes` has; None has none."""
    amount = amount_bytes or 0
    return total_bytes if amount >= total_bytes else amount // PAGE_BYTES * PAGE_BYTES


def state_that_may_stay(sizes: Sizes, away: Iterable[str]) -> int:
    """Of a rank's optimizer state, bytes that may stay on the device where the parameters of the groups in `away` are
    kept elsewhere: on CUDA, these are stepped on by the host.
    """
    of_others = 0 if sizes.kind == "cpu" else sum(map(sizes.state, away))
    return max(0, sizes.optimizer_state - of_others)


def state_without_pages(sizes: Sizes, away: Iterable[str]) -> int:
    """Of a rank's optimizer state, bytes that stay on the device whatever leaves, as pages have none of them, where the
    parameters of the groups in `away` are kept elsewhere: on CUDA, theirs is with them.
    """
    elsewhere = frozenset() if sizes.kind == "cpu" else frozenset(away)
    stays = sum(size for name, size in sizes.paging.unpaged.items() if name not in elsewhere)
    # Each group's is rounded up.
    return min(state_that_may_stay(sizes, elsewhere), stays)


def _state_tiers(sizes: Sizes, groups: Collection[str]) -> dict[str, int]:
    plan, total = sizes.plan, sizes.optimizer_state
    if sizes.workload.stage != "fit":
        return {}
    may_stay = state_that_may_stay(sizes, groups)
    if plan.offload_optimizer is None:
        return {"cpu": total - may_stay} if total > may_stay else {}
    stuck = state_without_pages(sizes, groups)
    leaves = total - stuck - whole_pages(may_stay - stuck, plan.resident_optimizer_bytes)
    in_dram = leaves if plan.offload_optimizer == "cpu" else whole_pages(leaves, plan.cpu_optimizer_bytes)
    return {tier: size for tier, size in (("cpu", in_dram), ("nvme", leaves - in_dram)) if size}
