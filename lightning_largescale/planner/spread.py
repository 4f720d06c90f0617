"""Tiers of the offloaded bytes: DRAM first, because it is faster, then a disk.

DRAM goes first to what moves most often: parameters, which every pass fetches; then activations, which every
micro-batch saves; then optimizer state.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 4 (bandwidth that each needs) and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_largescale.planner.placement import (
    gradient_staging,
    kept_elsewhere,
    kept_of_group,
    state_that_may_stay,
    state_without_pages,
    whole_pages,
)
from lightning_largescale.planner.remedy import Assigned, Choice, Remedy
from lightning_largescale.planner.transfers import Away
from lightning_largescale.prices import PRICES

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.sizes import Sizes

REMEDIES: dict[str, Remedy] = {remedy.name: remedy for price in reversed(PRICES) for remedy in price.remedies}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A plan that offloads the amounts of a choice, and its offloaded bytes by tier.

    Whether the host or the device steps on them is not decided yet.
    """

    plan: Plan
    away: Away


def spread(sizes: Sizes, remedies: frozenset[str], choice: Choice, tiers: Mapping[str, int]) -> Spread | None:
    """Spread the bytes that `choice` offloads over the tiers.

    Args:
        sizes: the sizes of a plan that offloads nothing.
        remedies: names of remedies.
        choice: the amounts.
        tiers: bytes that fit "cpu" and "nvme", for each of the two that can be used.

    Returns:
        The plan of `sizes` with these bytes offloaded; None if the tiers lack the room.
    """
    groups = sizes.movable[: len(sizes.movable) - choice.groups] if in_unit(remedies, "groups") else []
    taken = sizes.workload.blocks[: choice.blocks] if in_unit(remedies, "blocks") else ()
    blocks = () if recomputes(remedies) else taken
    saved = sum(sizes.saved_by(blocks))
    may_stay, stuck = state_that_may_stay(sizes, groups), state_without_pages(sizes, groups)
    stays = min(choice.state_bytes, may_stay - stuck) if in_unit(remedies, "pages") else may_stay - stuck
    state = sizes.optimizer_state - stuck - stays if sizes.workload.stage == "fit" else 0
    released = any(REMEDIES[name].frees_gradients for name in remedies)
    kept = {
        tier: [kept_of_group(sizes, name, tier, gradients=not released) for name in groups] for tier in ("cpu", "nvme")
    }
    dram, disk = tiers.get("cpu", 0), tiers.get("nvme")
    narrow = False
    if sum(kept["cpu"]) + saved + state + (gradient_staging(sizes, groups) if released else 0) > dram:
        if disk is None:
            return None
        most = sum(remedy.most_staging(sizes, groups, blocks) for remedy in REMEDIES.values())
        staging = most if "cpu" in tiers else 0
        dram, narrow = max(0, dram - staging), dram < staging
    in_dram, dram = _last_within(groups, kept["cpu"], dram) if "cpu" in tiers else ([], 0)
    saved_tier = "cpu" if saved <= dram and "cpu" in tiers else "nvme"
    state_in_dram = whole_pages(state, dram - (saved if saved_tier == "cpu" else 0))
    state_on_disk = state - state_in_dram
    on_disk = sum(kept["nvme"][: len(groups) - len(in_dram)]) + (saved if saved_tier == "nvme" else 0) + state_on_disk
    if on_disk > (disk or 0):
        return None
    assigned = Assigned(
        groups=groups,
        groups_in_dram=in_dram,
        blocks=taken,
        blocks_tier=saved_tier,
        state_bytes=stays,
        state_in_dram=state_in_dram,
        state_on_disk=state_on_disk,
    )
    # State leaves with parameters that do, whether or not more of it may.
    used = [one for one in REMEDIES.values() if one.name in remedies or (one.unit == "pages" and state)]
    fields = {name: value for remedy in used for name, value in remedy.fields(sizes, assigned).items()}
    plan = dataclasses.replace(sizes.plan, **fields)
    # This plan may need less staging in DRAM than the upper bound, so that too little for the bound can be enough.
    if narrow and kept_elsewhere(sizes.placing(plan)).get("cpu", 0) > tiers["cpu"]:
        return None
    return Spread(plan=plan, away=_away(sizes, assigned, {saved_tier: saved}))


def in_unit(remedies: frozenset[str], unit: str) -> frozenset[str]:
    """Return the names of the remedies that have an amount in `unit`."""
    return frozenset(name for name in remedies if REMEDIES[name].unit == unit)


def recomputes(remedies: frozenset[str]) -> bool:
    """Return whether one of the remedies recomputes blocks."""
    return any(REMEDIES[name].recomputes for name in remedies)


def _away(sizes: Sizes, assigned: Assigned, activations: Mapping[str, int]) -> Away:
    in_dram = assigned.groups_in_dram
    on_disk = assigned.groups[: len(assigned.groups) - len(in_dram)]
    fit = sizes.workload.stage == "fit"
    trained = {
        tier: sum(sizes.gradient(name, whole=False) for name in names) if fit else 0
        for tier, names in (("cpu", in_dram), ("nvme", on_disk))
    }
    return Away(
        parameters={"cpu": sum(map(sizes.shard, in_dram)), "nvme": sum(map(sizes.shard, on_disk))},
        trained=trained,
        state={"cpu": assigned.state_in_dram, "nvme": assigned.state_on_disk},
        activations=activations,
    )


def _last_within(groups: list[str], kept: list[int], size: int) -> tuple[list[str], int]:
    """Return the last groups that fit into `size` bytes, and the bytes left over."""
    count = 0
    while count < len(groups) and kept[-1 - count] <= size:
        size -= kept[-1 - count]
        count += 1
    return groups[len(groups) - count :], size
