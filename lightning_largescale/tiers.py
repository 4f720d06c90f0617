"""Sizes of transfers between the tiers, shared by the code that moves data and the planner.

A step on offloaded optimizer state runs page by page. While one page is stepped on, the next pages are read and the
previous ones are written, each in a buffer of its own. Blocks with offloaded parameters are prefetched, one or more
ahead.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2 (the infinity offload engine).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan

# Bytes of one page: optimizer state, and parameters and gradients that are offloaded too.
PAGE_BYTES = 32 * 2**20
# Pages in memory at once: one that is stepped on, others that are read or written.
PAGE_BUFFERS = 6
# Bytes of one request to a disk, and the number of concurrent requests.
REQUEST_BYTES, REQUESTS = 4 * 2**20, 8
# O_DIRECT requires addresses, offsets and lengths to be multiples of this.
ALIGNMENT_BYTES = 4096


def aligned(size: int) -> int:
    """Round `size` bytes up to a multiple of `ALIGNMENT_BYTES`."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def pinned_bytes(size: int) -> int:
    """Return the bytes that torch's allocator of pinned memory takes for `size` bytes: the next power of two.

    Source: torch, ATen/core/CachingHostAllocator.h.
    """
    return 1 << (size - 1).bit_length() if size else 0


def page_buffer_bytes(moved_bytes: int, page_bytes: int) -> int:
    """Return the bytes of the page buffers for a step that pages `moved_bytes` in pages of at most `page_bytes`."""
    return min(PAGE_BUFFERS * page_bytes, aligned(moved_bytes))


def shard_bytes(shape: Sequence[int], nbytes: int, dp_shard: int, tp: int = 1, tp_dim: int | None = None) -> int:
    """Return the bytes of the largest shard of a parameter.

    Args:
        shape: The shape of the full parameter.
        nbytes: The bytes of the full parameter.
        dp_shard: The number of ranks that the rows of each tensor-parallel shard are sharded among, padded to the
            largest chunk.
        tp: The number of tensor-parallel ranks.
        tp_dim: The dimension that is sharded among these; None if the parameter is replicated.

    Source: torch.distributed.fsdp.fully_shard, "Shard(0)" with padding to the largest chunk.
    """
    part = nbytes if tp_dim is None else nbytes // tp
    if dp_shard == 1 or not shape or shape[0] == 0:
        return part
    rows = shape[0] // tp if tp_dim == 0 else shape[0]
    return math.ceil(rows / dp_shard) * (part // rows)


def group_tiers(plan: Plan, sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the tier of each FSDP group whose parameters are offloaded, by name.

    The last groups stay on the device, as far as `resident_parameter_bytes` allows. With offload to "nvme", the last of
    the others go to DRAM, as far as `cpu_parameter_bytes` allows.

    Args:
        plan: The plan; `offload_parameters` and the two budgets are read.
        sizes: The bytes of each group's shard, in the order of the groups in the module.
    """
    if plan.offload_parameters is None:
        return {}
    leave, _ = _without_last([*sizes], sizes, plan.resident_parameter_bytes)
    if plan.offload_parameters == "cpu":
        return dict.fromkeys(leave, "cpu")
    to_disk, in_dram = _without_last(leave, sizes, plan.cpu_parameter_bytes)
    return {**dict.fromkeys(to_disk, "nvme"), **dict.fromkeys(in_dram, "cpu")}


def _without_last(names: list[str], sizes: Mapping[str, int], amount: int | None) -> tuple[list[str], list[str]]:
    """Split `names` into the first ones and the last ones whose sizes total at most `amount`; None counts as 0."""
    left, count = amount or 0, len(names)
    while count and sizes[names[count - 1]] <= left:
        count -= 1
        left -= sizes[names[count]]
    return names[:count], names[count:]
