"""Links of the collectives that training uses, measured on the default process group.

Every rank takes part in every call. Rank 0 decides the sizes and the number of repeats, and broadcasts them.

Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH", section 4 (the ring model
that is fitted); nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from lightning_largescale import comm
from lightning_largescale.hardware.hardware import Link
from lightning_largescale.hardware.measure import REPEATS, fit_link, timed

# Bytes of one hop of a ring, from latency-bound to bandwidth-bound.
_HOP_BYTES = (2**10, 2**15, 2**19, 2**22, 2**24)


def hop_sizes(ranks: int, most_bytes: int) -> list[int]:
    """Return the bytes per hop to measure, smallest first, such that scratch for `ranks` ranks fits `most_bytes`."""
    return [size for size in _HOP_BYTES if 2 * ranks * size <= most_bytes] or [_HOP_BYTES[0]]


def collective_links(whole: torch.Tensor, shard: torch.Tensor, seconds: float) -> dict[str, Link]:
    """Measure the links of all-gather, reduce-scatter and all-reduce on the default process group, slowest rank's.

    This is a collective: every rank calls it, with tensors of the same shapes.

    Args:
        whole: float32 scratch tensor of `ranks` shards, on the device whose collectives are measured.
        shard: scratch tensor of the largest shard.
        seconds: time for all three collectives.

    Source: the module's docstring.
    """
    # Imported here because it imports Lightning, which Hardware alone does not need.
    from lightning_largescale.compat import all_gather_tensor, reduce_scatter_tensor

    ranks = comm.world_size()
    operations: dict[str, tuple[int, Callable[[torch.Tensor, torch.Tensor], Any]]] = {
        "all_gather": (ranks - 1, all_gather_tensor),
        "reduce_scatter": (ranks - 1, lambda whole, shard: reduce_scatter_tensor(shard, whole)),
        "all_reduce": (2 * (ranks - 1), lambda whole, shard: comm.all_reduce(whole)),
    }
    sizes = hop_sizes(ranks, 2 * whole.numel() * whole.element_size())
    links = {}
    for name, (hops, call) in operations.items():
        points = _points(whole, shard, call, sizes, seconds / len(operations))
        links[name] = fit_link([(size, taken / hops) for size, taken in points])
    return links


def agree(value: int, device: torch.device) -> int:
    """Return rank 0's `value` on every rank."""
    box = torch.tensor([value], dtype=torch.int64, device=device)
    comm.broadcast(box)
    return int(box.item())


def meet(device: torch.device) -> None:
    """Wait until every rank has called this. (`barrier` would warn about the device that it picks.)"""
    box = torch.zeros(1, device=device)
    comm.all_reduce(box)
    box.item()


def _points(
    whole: torch.Tensor, shard: torch.Tensor, call: Callable[..., Any], sizes: list[int], seconds: float
) -> list[tuple[int, float]]:
    """Return `(bytes per hop, seconds of the call)` for growing sizes, as many as time permits but at least one."""
    deadline = perf_counter() + seconds
    points: list[tuple[int, float]] = []
    for size in sizes:
        if points:
            expected = points[-1][1] * size / points[-1][0]
            if not agree(int(perf_counter() + 3 * expected < deadline), whole.device):
                break
        count = size // shard.element_size()
        points.append((size, _seconds(whole[: count * comm.world_size()], shard[:count], call, deadline)))
    slowest = torch.tensor([taken for _, taken in points], dtype=torch.float64, device=whole.device)
    comm.all_reduce(slowest, dist.ReduceOp.MAX)
    return [(size, taken) for (size, _), taken in zip(points, slowest.tolist(), strict=True)]


def _seconds(whole: torch.Tensor, shard: torch.Tensor, call: Callable[..., Any], deadline: float) -> float:
    """Return the median seconds of one call; all ranks start each call together."""
    device = whole.device
    run = partial(call, whole, shard)
    # The first call of a size includes setup, and is not timed.
    run()
    meet(device)
    times = [timed(run, device)]
    left = max(0.0, deadline - perf_counter()) / 2
    for _ in range(agree(max(0, min(REPEATS - 1, int(left / times[0]))), device)):
        meet(device)
        times.append(timed(run, device))
    return median(times)
