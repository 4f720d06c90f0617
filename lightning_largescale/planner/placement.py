"""Placement of a rank's bytes in the tiers between their uses.

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
    """The tiers of all that a plan offloads.

    Attributes:
        groups: tier of each offloaded parameter group, by name; groups that stay are left out.
        state: bytes of offloaded optimizer state, by tier.
        activations: tier of the activations that `blocks` save; None if they stay.
        blocks: names of the blocks whose activations are offloaded.
        outside: tiers that are not the device's own memory (on CPU, DRAM is the device's memory).
        away: names of the groups whose parameters are not in the device's memory.
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, int] = field(default_factory=dict)
    activations: str | None = None
    blocks: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    away: frozenset[str] = frozenset()

    @property
    def state_away(self) -> int:
        """Bytes of optimizer state outside the device's memory."""
        return sum(size for tier, size in self.state.items() if tier in self.outside)


def place(sizes: Sizes) -> Placement:
    """Return the placement of the plan of `sizes`."""
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
    """Return `amount_bytes` rounded down to full pages, at most `total_bytes`; 0 for None."""
    amount = amount_bytes or 0
    return total_bytes if amount >= total_bytes else amount // PAGE_BYTES * PAGE_BYTES


def state_that_may_stay(sizes: Sizes, away: Iterable[str]) -> int:
    """Return the bytes of a rank's optimizer state that may stay on the device if the groups in `away` are offloaded.

    On CUDA the state of these groups may not stay: the host steps on them.
    """
    of_others = 0 if sizes.kind == "cpu" else sum(map(sizes.state, away))
    return max(0, sizes.optimizer_state - of_others)


def state_without_pages(sizes: Sizes, away: Iterable[str]) -> int:
    """Return the bytes of a rank's optimizer state that cannot be paged and so always stay on the device.

    The groups in `away` are those with offloaded parameters. On CUDA their state is kept with the parameters, and does
    not count.
    """
    elsewhere = frozenset() if sizes.kind == "cpu" else frozenset(away)
    stays = sum(size for name, size in sizes.paging.unpaged.items() if name not in elsewhere)
    # The bytes of each group are rounded up, so that their sum may be too large.
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
