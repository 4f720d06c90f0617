"""Terms of peak memory due to offload: resident bytes, bytes in flight, and bytes kept in other tiers.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5; Lv et al. 2023, "Full Parameter Fine-tuning for Large
    Language Models with Limited Resources", section 3 (gradient release).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.tiers import (
    PAGE_BUFFERS,
    PAGE_BYTES,
    REQUEST_BYTES,
    REQUESTS,
    aligned,
    page_buffer_bytes,
)

# Blocks whose activations are on their way out at once, and those whose gradients are, beside a CUDA device.
_BLOCKS_OUT, _GRADIENTS_OUT = 2, 2


def parameters_here(sizes: Sizes) -> int:
    """Return the bytes of a rank's parameters in the device's memory between their uses."""
    return sizes.parameters - sum(map(sizes.shard, sizes.placement.away))


def state_here(sizes: Sizes) -> int:
    """Return the bytes of a rank's optimizer state in the device's memory between steps."""
    return sizes.optimizer_state - sizes.placement.state_away if sizes.workload.stage == "fit" else 0


def parameters_in_flight(sizes: Sizes, *, backward: bool) -> list[int]:
    """Return, for each segment, the bytes of parameter shards that are prefetched into the device's memory.

    They are the shard of the group that computes, until it has been all-gathered, and those of the next groups to
    fetch. On CUDA prefetched shards wait in DRAM. Only a group gathered from a single rank is on the device twice,
    while the segment holds less than at its peak.
    """
    if sizes.kind != "cpu":
        return [_copied_alone(sizes, index, backward=backward) for index in range(len(sizes.blocks))]
    groups, most = sizes.placement.groups, sizes.plan.prefetched_blocks + 1
    if not groups:
        return [0] * len(sizes.blocks)
    ahead: list[str] = []
    found: list[int] = []
    for block in sizes.blocks if backward else sizes.blocks[::-1]:
        if block in groups and ahead[:1] != [block]:
            ahead = [str(block), *(name for name in ahead if name != block)][:most]
        found.append(sum(map(sizes.shard, ahead)))
    return found if backward else found[::-1]


def _copied_alone(sizes: Sizes, index: int, *, backward: bool) -> int:
    block, segment = sizes.blocks[index], sizes.step.segments[index]
    kept = backward and not sizes.plan.reshard_after_forward
    if block not in sizes.placement.groups or sizes.plan.dp_shard > 1 or kept:
        return 0
    rise = segment.forward_peak_bytes - segment.forward_entry_bytes
    if backward:
        rise = segment.backward_peak_bytes - segment.backward_entry_bytes + sizes.own_gradient(index)
    return max(0, sizes.shard(block) - max(0, rise))


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


def gradients_passing(sizes: Sizes, blocks: Iterable[str | None]) -> int:
    """Return the gradient bytes of those of `blocks` whose gradients are used or offloaded as soon as they arrive.

    On CUDA the gradients of offloaded parameters are in DRAM, and do not count.
    """
    in_dram = set(sizes.placement.groups) if sizes.kind != "cpu" else set()
    return sum(sizes.gradient(block, whole=False) for block in {*blocks} - in_dram if sizes.passes(block))


def moved_in_step(sizes: Sizes) -> Mapping[str, int]:
    """Return, by tier, the bytes read for the optimizer's step: state, parameters, and gradients unless released.

    State and parameters are written back.
    """
    moved: Counter[str] = Counter()
    if sizes.workload.stage != "fit":
        return moved
    moved.update(sizes.placement.state)
    for name, tier in sizes.placement.groups.items():
        # A parameter and its gradient have the same bytes.
        moved[tier] += sizes.gradient(name, whole=False) * (1 if sizes.plan.release_gradients else 2)
    return moved


def page_buffers(sizes: Sizes) -> int:
    """Return the bytes of the device's memory in the page buffers of the optimizer's step, which persist across steps.

    On CUDA the buffers are in pinned memory instead: see `staging_bytes`.
    """
    return buffer_bytes(sizes.kind, sum(moved_in_step(sizes).values()), largest_page(sizes))


def buffer_bytes(kind: str, moved_bytes: int, page_bytes: int) -> int:
    """Return the bytes of page buffers in the device's memory for `moved_bytes` a step, in pages of `page_bytes`."""
    return page_buffer_bytes(moved_bytes, page_bytes) if kind == "cpu" else 0


def largest_page(sizes: Sizes) -> int:
    """Return the bytes of the largest page; it exceeds `PAGE_BYTES` if it holds a parameter that cannot be split."""
    found = PAGE_BYTES
    for name, (largest, state) in sizes.paging.undivided.items():
        moves = state and (name in sizes.placement.groups or sizes.plan.host_optimizer_step)
        found = max(found, state + (largest * (1 if sizes.plan.release_gradients else 2) if moves else 0))
    return found


def temporaries(sizes: Sizes, names: Iterable[str | None]) -> int:
    """Return the peak bytes of temporaries on the device while the optimizer steps on these groups.

    For paged groups they are those of one page; on CUDA the page's state is brought to the device as well. On CUDA the
    host steps on offloaded parameters, which need none.
    """
    in_pages: list[tuple[int, int]] = []
    at_once: list[tuple[int, int]] = []
    paging = sizes.paging
    state, page, page_state = 0, _page_parameter_bytes(sizes), PAGE_BYTES
    for name in names:
        if name in sizes.placement.groups:
            # On the CPU pages hold the parameters too.
            in_pages += [sizes.stepped.get(name, (0, 0))] if sizes.kind == "cpu" else []
        elif sizes.plan.offload_optimizer is None:
            at_once.append(sizes.stepped.get(name, (0, 0)))
        else:
            in_pages.append(paging.stepped.get(name, (0, 0)))
            at_once.append(paging.stepped_at_once.get(name, (0, 0)))
            state += sizes.state(name) - paging.unpaged.get(name, 0) if sizes.kind != "cpu" else 0
        largest, largest_state = paging.undivided.get(name, (0, 0))
        page, page_state = max(page, largest), max(page_state, largest_state)
    return max(_temporaries(sizes, at_once, None), _temporaries(sizes, in_pages, page) + min(state, page_state))


def kept_elsewhere(sizes: Sizes) -> dict[str, int]:
    """Return, by tier, the bytes of one rank kept outside the device's memory.

    On CUDA the staging buffers of transfers count as DRAM, and what the last block saves does not leave the device.
    """
    place = sizes.placement
    kept: Counter[str] = Counter(place.state)
    for name, tier in place.groups.items():
        kept[tier] += kept_of_group(sizes, name, tier, gradients=not sizes.plan.release_gradients)
    if place.activations is not None:
        kept[place.activations] += sum(
            map(sizes.leaving_of, sizes.step.segments) if sizes.kind == "cpu" else _out(sizes)
        )
    if sizes.kind != "cpu":
        kept["cpu"] += staging_bytes(sizes)
    return {tier: size for tier, size in kept.items() if size and tier in place.outside}


def kept_of_group(sizes: Sizes, name: str, tier: str, *, gradients: bool) -> int:
    """Return the bytes of a group's shard and gradients that are kept in a tier.

    Args:
        sizes: the sizes of the plan.
        name: the group's name.
        tier: the tier, "cpu" or "nvme".
        gradients: whether gradients stay there until the optimizer's step.
    """
    gradients &= sizes.workload.stage == "fit"
    if sizes.kind != "cpu" and tier == "cpu":
        return sum(sizes.pinned(name)[: 1 + gradients])
    return sizes.shard(name) + (sizes.gradient(name, whole=False) if gradients else 0)


def staging_bytes(sizes: Sizes) -> int:
    """Return the bytes of a CUDA device's staging buffers in DRAM: for disk transfers, and for the host's step."""
    place = sizes.placement
    on_disk = [name for name, tier in place.groups.items() if tier == "nvme"]
    passing = [*place.groups] if sizes.plan.release_gradients else on_disk
    staging = _page_staging(sizes, on_disk) + shard_staging(sizes, on_disk) + gradient_staging(sizes, passing)
    return staging + (activation_staging(sizes, _out(sizes)) if place.activations == "nvme" else 0)


def shard_staging(sizes: Sizes, on_disk: Sequence[str]) -> int:
    """Return the bytes of the buffers in DRAM for shards of the groups `on_disk`, each as large as the largest."""
    return min(len(on_disk), sizes.plan.prefetched_blocks + 1) * max(map(sizes.shard, on_disk), default=0)


def gradient_staging(sizes: Sizes, groups: Sequence[str]) -> int:
    """Return the bytes in DRAM of gradients of `groups`, which come there and do not stay."""
    if sizes.workload.stage != "fit":
        return 0
    return sum(sorted((sizes.pinned(name)[1] for name in groups), reverse=True)[:_GRADIENTS_OUT])


def activation_staging(sizes: Sizes, saved: Sequence[int]) -> int:
    """Return the bytes in DRAM of activations on their way to a disk and back, of blocks that save `saved` bytes."""
    back = sum(sorted(saved, reverse=True)[: sizes.plan.prefetched_blocks + 1])
    return back + (REQUESTS * REQUEST_BYTES if back else 0)


def _page_staging(sizes: Sizes, on_disk: Collection[str]) -> int:
    """Return the bytes of the page buffers in DRAM for state on a disk, and for parameters that the CPU steps on.

    State that stays in DRAM goes through no buffer.
    """
    if sizes.workload.stage != "fit":
        return 0
    place, host = sizes.placement, sizes.plan.host_optimizer_step
    copied = [name for name in sizes.stepped if host and name not in place.groups]
    beside = sum(sizes.gradient(name, whole=False) for name in on_disk) * (1 if sizes.plan.release_gradients else 2)
    beside += 2 * sum(sizes.stepped[name][1] for name in copied)
    state, page = place.state.get("nvme", 0), largest_page(sizes)
    if not state:
        page = page * beside // max(1, beside + sum(map(sizes.state, [*on_disk, *copied])))
    total = aligned(state + beside)
    return min(PAGE_BUFFERS, -(-total // min(page, PAGE_BYTES))) * min(page, total) if total else 0


def _out(sizes: Sizes) -> list[int]:
    """Return the bytes that each block saves in another tier, beside a CUDA device.

    A block's offload begins with the next block's forward, so the last one's stays.
    """
    return [size for size in map(sizes.leaving_of, sizes.step.segments) if size][:-1]


def _page_parameter_bytes(sizes: Sizes) -> int:
    """Return the bytes of the parameters that one page updates."""
    state = sum(sizes.paging.state.values())
    if sizes.plan.offload_optimizer is None or not state:
        return PAGE_BYTES // (1 if sizes.plan.release_gradients else 2)
    return int(PAGE_BYTES * sum(total for _, total in sizes.paging.stepped.values()) / state)


def _temporaries(sizes: Sizes, groups: list[tuple[int, int]], page: int | None) -> int:
    largest = max((largest for largest, _ in groups), default=0)
    total = sum(total for _, total in groups)
    if page is not None:
        largest, total = min(largest, page), min(total, page)
    return max(
        (
            int(needs.step_temporary_largest * largest + needs.step_temporary_total * total)
            for needs in sizes.workload.optimizers
        ),
        default=0,
    )
