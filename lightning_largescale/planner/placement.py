"""Placement of a rank's bytes in the tiers between their uses.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (what moves between device, CPU and NVMe).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_largescale.tiers import PAGE_BYTES

if TYPE_CHECKING:
    from lightning_largescale.planner.sizes import Sizes

# Blocks whose gradients are on their way out at once, beside a CUDA device.
_GRADIENTS_OUT = 2


@dataclass(kw_only=True)
class Placement:
    """The tiers of all that a plan offloads, as its techniques set them.

    Attributes:
        outside: tiers that are not the device's own memory (on CPU, DRAM is the device's memory).
        groups: tier of each offloaded parameter group, by name; groups that stay are left out.
        activations: tier of the activations that `blocks` save; None if they stay.
        blocks: names of the blocks whose activations are offloaded.
        state: bytes of offloaded optimizer state, by tier.
    """

    outside: frozenset[str]
    groups: Mapping[str, str] = field(default_factory=dict)
    activations: str | None = None
    blocks: frozenset[str] = frozenset()
    state: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def away(self) -> frozenset[str]:
        """Names of the groups whose parameters are not in the device's memory."""
        return frozenset(name for name, tier in self.groups.items() if tier in self.outside)

    @property
    def state_away(self) -> int:
        """Bytes of optimizer state outside the device's memory."""
        return sum(size for tier, size in self.state.items() if tier in self.outside)


def outside_tiers(kind: str) -> frozenset[str]:
    """Return the tiers that are not a device's own memory."""
    return frozenset({"nvme"} if kind == "cpu" else {"cpu", "nvme"})


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


def kept_elsewhere(sizes: Sizes) -> dict[str, int]:
    """Return, by tier, the bytes of one rank kept outside the device's memory.

    On CUDA the staging buffers of transfers count as DRAM.
    """
    place = sizes.placement
    kept = dict(place.state)
    for name, tier in place.groups.items():
        kept[tier] = kept.get(tier, 0) + kept_of_group(sizes, name, tier, gradients=not sizes.releases)
    if place.activations is not None:
        kept[place.activations] = kept.get(place.activations, 0) + sum(sizes.saved_elsewhere)
    if sizes.kind != "cpu":
        kept["cpu"] = kept.get("cpu", 0) + sizes.staging_bytes
    return {tier: size for tier, size in kept.items() if size and tier in place.outside}


def kept_of_group(sizes: Sizes, name: str, tier: str, *, gradients: bool) -> int:
    """Return the bytes that a group keeps in a tier.

    Args:
        sizes: the sizes of the plan.
        name: the group.
        tier: the tier.
        gradients: whether its gradients are kept with its shard.
    """
    gradients &= sizes.workload.stage == "fit"
    if sizes.kind != "cpu" and tier == "cpu":
        return sum(sizes.pinned(name)[: 1 + gradients])
    return sizes.shard(name) + (sizes.gradient(name, whole=False) if gradients else 0)


def gradient_staging(sizes: Sizes, groups: Iterable[str]) -> int:
    """Return the bytes in DRAM of gradients of `groups`, which come there and do not stay."""
    if sizes.workload.stage != "fit":
        return 0
    return sum(sorted((sizes.pinned(name)[1] for name in groups), reverse=True)[:_GRADIENTS_OUT])
