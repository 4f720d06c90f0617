"""Which of a rank's bytes a plan keeps in which tier between their uses.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (what moves between device, CPU and NVMe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_largescale.tiers import PAGE_BYTES

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
    """

    groups: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, int] = field(default_factory=dict)
    activations: str | None = None
    blocks: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()

    @property
    def away(self) -> frozenset[str]:
        """Groups whose parameters are not in the device's memory."""
        return frozenset(name for name, tier in self.groups.items() if tier in self.outside)

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
    return Placement(
        groups=_group_tiers(sizes),
        state=_state_tiers(sizes),
        activations=plan.offload_activations if blocks else None,
        blocks=blocks,
        outside=frozenset({"nvme"} if sizes.kind == "cpu" else {"cpu", "nvme"}),
    )


def whole_pages(total_bytes: int, amount_bytes: int | None) -> int:
    """Of `total_bytes`, those in as many whole pages as `amount_bytes` has; None has none."""
    amount = amount_bytes or 0
    return total_bytes if amount >= total_bytes else amount // PAGE_BYTES * PAGE_BYTES


def last_groups(sizes: Sizes, names: Sequence[str], amount_bytes: int | None) -> list[str]:
    """Of the groups in `names`, the last ones whose shards make no more than `amount_bytes` in all; None has none."""
    taken: list[str] = []
    left = amount_bytes or 0
    for name in reversed(names):
        left -= sizes.shard(name)
        if left < 0:
            break
        taken.append(name)
    return taken


def _group_tiers(sizes: Sizes) -> dict[str, str]:
    plan = sizes.plan
    if plan.offload_parameters is None:
        return {}
    stay = set(last_groups(sizes, sizes.movable, plan.resident_parameter_bytes))
    leave = [name for name in sizes.movable if name not in stay]
    in_dram = set(last_groups(sizes, leave, plan.cpu_parameter_bytes))
    return {name: "cpu" if name in in_dram else plan.offload_parameters for name in leave}


def _state_tiers(sizes: Sizes) -> dict[str, int]:
    plan, total = sizes.plan, sizes.optimizer_state
    if plan.offload_optimizer is None or sizes.workload.stage != "fit":
        return {}
    leaves = total - whole_pages(total, plan.resident_optimizer_bytes)
    in_dram = leaves if plan.offload_optimizer == "cpu" else whole_pages(leaves, plan.cpu_optimizer_bytes)
    return {tier: size for tier, size in (("cpu", in_dram), ("nvme", leaves - in_dram)) if size}
