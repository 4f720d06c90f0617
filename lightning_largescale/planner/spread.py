"""Tiers of the offloaded bytes: DRAM first, because it is faster, then a disk.

DRAM goes first to what moves most often: parameters, which every pass fetches; then activations, which every
micro-batch saves; then optimizer state.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 4 (bandwidth that each needs) and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_largescale.plan import Plan
from lightning_largescale.planner.paging import largest_page
from lightning_largescale.planner.placement import kept_elsewhere, state_that_may_stay, state_without_pages, whole_pages
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.transfers import Away
from lightning_largescale.tiers import PAGE_BUFFERS

# Techniques of blocks, of which a plan uses one: offload of activations, or recomputation of all or cheap operations.
RECOMPUTATION = {"recomputation": "all", "cheap recomputation": "cheap"}
OF_BLOCKS = frozenset({"activations", *RECOMPUTATION})
# Budget in bytes of a tier that has room for anything.
UNLIMITED = 2**63


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The amounts that stay on the device, and that leave it.

    Attributes:
        groups: number of parameter groups that stay, counted from the last.
        blocks: number of blocks whose activations are offloaded, or that recompute, counted from the first.
        state_bytes: bytes of optimizer state that stay.
    """

    groups: int = 0
    blocks: int = 0
    state_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A plan that offloads the amounts of a choice, and its offloaded bytes by tier.

    Whether the host or the device steps on them is not decided yet.
    """

    plan: Plan
    away: Away


def spread(sizes: Sizes, techniques: frozenset[str], choice: Choice, tiers: Mapping[str, int]) -> Spread | None:
    """Spread the bytes that `choice` offloads over the tiers.

    Args:
        sizes: the sizes of a plan that offloads nothing.
        techniques: any of "release", "optimizer", "parameters", and one of `OF_BLOCKS`.
        choice: the amounts.
        tiers: bytes that fit "cpu" and "nvme", for each of the two that can be used.

    Returns:
        The plan of `sizes` with these bytes offloaded; None if the tiers lack the room.
    """
    groups = sizes.movable[: len(sizes.movable) - choice.groups] if "parameters" in techniques else []
    blocks = sizes.workload.blocks[: choice.blocks] if "activations" in techniques else ()
    saved = sum(_saved(sizes, blocks))
    trained = [sizes.gradient(name, whole=False) if sizes.workload.stage == "fit" else 0 for name in groups]
    may_stay, stuck = state_that_may_stay(sizes, groups), state_without_pages(sizes, groups)
    stays = min(choice.state_bytes, may_stay - stuck) if "optimizer" in techniques else may_stay - stuck
    state = sizes.optimizer_state - stuck - stays if sizes.workload.stage == "fit" else 0
    gradients = 0 if "release" in techniques else 1
    kept = [sizes.shard(name) + gradients * size for name, size in zip(groups, trained, strict=True)]
    dram, disk = tiers.get("cpu", 0), tiers.get("nvme")
    narrow = False
    if sum(kept) + saved + state > dram:
        if disk is None:
            return None
        staging = _staging(sizes, groups, blocks) if "cpu" in tiers else 0
        dram, narrow = max(0, dram - staging), dram < staging
    in_dram, dram = _last_within(groups, kept, dram) if "cpu" in tiers else ([], 0)
    saved_tier = "cpu" if saved <= dram and "cpu" in tiers else "nvme"
    state_in_dram = whole_pages(state, dram - (saved if saved_tier == "cpu" else 0))
    on_disk = sum(kept[: len(kept) - len(in_dram)]) + (saved if saved_tier == "nvme" else 0) + state - state_in_dram
    if on_disk > (disk or 0):
        return None
    fields: dict[str, Any] = {"release_gradients": "release" in techniques}
    for name in techniques & {*RECOMPUTATION}:
        fields |= {
            "activation_checkpointing": "selective",
            "checkpointed_blocks": sizes.workload.blocks[: choice.blocks],
            "checkpointed_operations": RECOMPUTATION[name],
        }
    if groups:
        shards = sum(map(sizes.shard, in_dram))
        stay = sum(map(sizes.shard, sizes.movable[len(groups) :]))
        fields |= _fields("parameter", len(in_dram) < len(groups), stay, shards)
        fields["offload_parameters"] = fields.pop("tier")
    if state:
        fields |= _fields("optimizer", state_in_dram < state, stays, state_in_dram)
        fields["offload_optimizer"] = fields.pop("tier")
    if blocks:
        some = tuple(blocks) if len(blocks) < len(sizes.workload.blocks) else None
        fields |= {"offload_activations": saved_tier, "offloaded_blocks": some}
    plan = dataclasses.replace(sizes.plan, **fields)
    # This plan may need less staging in DRAM than the upper bound, so that too little for the bound can be enough.
    if narrow and kept_elsewhere(sizes.placing(plan)).get("cpu", 0) > tiers["cpu"]:
        return None
    away = _away(sizes, groups, in_dram, {saved_tier: saved}, {"cpu": state_in_dram, "nvme": state - state_in_dram})
    return Spread(plan=plan, away=away)


def _fields(what: str, to_disk: bool, stay: int, in_dram: int) -> dict[str, Any]:
    return {
        "tier": "nvme" if to_disk else "cpu",
        f"resident_{what}_bytes": stay or None,
        f"cpu_{what}_bytes": (in_dram or None) if to_disk else None,
    }


def _away(
    sizes: Sizes,
    groups: Sequence[str],
    in_dram: Sequence[str],
    activations: Mapping[str, int],
    state: Mapping[str, int],
) -> Away:
    on_disk = groups[: len(groups) - len(in_dram)]
    fit = sizes.workload.stage == "fit"
    trained = {
        tier: sum(sizes.gradient(name, whole=False) for name in names) if fit else 0
        for tier, names in (("cpu", in_dram), ("nvme", on_disk))
    }
    return Away(
        parameters={"cpu": sum(map(sizes.shard, in_dram)), "nvme": sum(map(sizes.shard, on_disk))},
        trained=trained,
        state=state,
        activations=activations,
    )


def _last_within(groups: list[str], kept: list[int], size: int) -> tuple[list[str], int]:
    """Return the last groups that fit into `size` bytes, and the bytes left over."""
    count = 0
    while count < len(groups) and kept[-1 - count] <= size:
        size -= kept[-1 - count]
        count += 1
    return groups[len(groups) - count :], size


def _saved(sizes: Sizes, blocks: Sequence[str]) -> list[int]:
    """Return the bytes of saved activations that can be offloaded, for each segment of `blocks`."""
    names = frozenset(blocks)
    return [
        segment.saved_bytes - (sizes.saving(segment) if sizes.recomputes(segment) else 0)
        for segment in sizes.step.segments
        if segment.block in names
    ]


def _staging(sizes: Sizes, groups: Sequence[str], blocks: Sequence[str]) -> int:
    """Return an upper bound of the bytes of staging buffers in DRAM for transfers to and from a disk."""
    shards = (sizes.plan.prefetched_blocks + 1) * max(map(sizes.shard, groups), default=0)
    saved = sorted(_saved(sizes, blocks), reverse=True)[:2]
    return PAGE_BUFFERS * largest_page(sizes) + shards + sum(saved)
