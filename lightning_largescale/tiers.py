"""How bytes move between the tiers: the sizes that what moves them and what plans for it have in common.

A step on optimizer state that is elsewhere runs page by page; while one page is stepped on, the next are read and the
last are written, each in a buffer of its own. Blocks whose parameters are elsewhere are fetched one or more ahead.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2 (the infinity offload engine).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan

# Bytes of one page: of optimizer state, and of the parameters and gradients that are elsewhere too.
PAGE_BYTES = 32 * 2**20
# Pages in memory at once: one that is stepped on, others on their way in and out.
PAGE_BUFFERS = 6
# Bytes of one request to a disk, and how many are under way at once.
REQUEST_BYTES, REQUESTS = 4 * 2**20, 8
# What O_DIRECT wants addresses, offsets and lengths to be multiples of.
ALIGNMENT_BYTES = 4096


def aligned(size: int) -> int:
    """`size` bytes rounded up to what O_DIRECT takes."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def page_buffer_bytes(moved_bytes: int, page_bytes: int) -> int:
    """Bytes of the buffers, for pages of `page_bytes` at most, through which `moved_bytes` are paged in one step."""
    return min(PAGE_BUFFERS * page_bytes, aligned(moved_bytes))


def shard_bytes(shape: Sequence[int], nbytes: int, dp_shard: int, tp: int = 1, tp_dim: int | None = None) -> int:
    """Bytes of the largest shard of a parameter.

    Args:
        shape: of the whole parameter.
        nbytes: likewise.
        dp_shard: ranks that rows of its first dimension are divided among, rounded up; those of what each rank of
            tensor parallelism has.
        tp: ranks of tensor parallelism.
        tp_dim: the dimension that is divided among these; None where each has all.

    Source: torch.distributed.fsdp.fully_shard, "Shard(0)" with padding to the largest chunk.
    """
    part = nbytes if tp_dim is None else nbytes // tp
    if dp_shard == 1 or not shape or shape[0] == 0:
        return part
    rows = shape[0] // tp if tp_dim == 0 else shape[0]
    return math.ceil(rows / dp_shard) * (part // rows)


def group_tiers(plan: Plan, sizes: Mapping[str, int]) -> dict[str, str]:
    """The tier of each group whose parameters leave the device, by name; the last ones stay there, and of the others
    the last go to DRAM, as far as the plan's amounts of bytes go.

    Args:
        plan: what may leave, and how many bytes of it stay.
        sizes: bytes of each group's shard, in the order in which the module has the groups.
    """
    if plan.offload_parameters is None:
        return {}
    leave, _ = _without_last([*sizes], sizes, plan.resident_parameter_bytes)
    if plan.offload_parameters == "cpu":
        return dict.fromkeys(leave, "cpu")
    to_disk, in_dram = _without_last(leave, sizes, plan.cpu_parameter_bytes)
    return {**dict.fromkeys(to_disk, "nvme"), **dict.fromkeys(in_dram, "cpu")}


def _without_last(names: list[str], sizes: Mapping[str, int], amount: int | None) -> tuple[list[str], list[str]]:
    """`names` without the last ones whose sizes make no more than `amount` in all, and these; None has none."""
    left, count = amount or 0, len(names)
    while count and sizes[names[count - 1]] <= left:
        count -= 1
        left -= sizes[names[count]]
    return names[:count], names[count:]
