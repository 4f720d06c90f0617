"""Links of the collectives that training uses, measured on the process group in use.

Every rank takes part in every call: rank 0 decides how many repeats and which sizes, and tells the others.

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

# Bytes that one hop of a ring carries: from what latency rules to what bandwidth rules.
_HOP_BYTES = (2**10, 2**15, 2**19, 2**22, 2**24)


def hop_sizes(ranks: int, most_bytes: int) -> list[int]:
    """Bytes a hop that are measured, smallest first, where `ranks` times the largest may take `most_bytes`."""
    return [size for size in _HOP_BYTES if 2 * ranks * size <= most_bytes] or [_HOP_BYTES[0]]


def collective_links(whole: torch.Tensor, shard: torch.Tensor, seconds: float) -> dict[str, Link]:
    """Links of all-gather, reduce-scatter and all-reduce over the default process group, of its slowest rank.

    A collective call: every rank makes it, with tensors of the same shapes.

    Args:
        whole: scratch, float32, on the device whose collectives are measured; of `ranks` shards.
        shard: scratch, of the largest shard.
        seconds: time for all three.

    Source: the module's docstring.
    """
    # Lightning comes with it, which a Hardware alone does without.
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
    """Rank 0's `value`, on every rank."""
    box = torch.tensor([value], dtype=torch.int64, device=device)
    comm.broadcast(box)
    return int(box.item())


def meet(device: torch.device) -> None:
    """Return when every rank has come here. (`barrier` would warn about the device that it picks.)"""
    box = torch.zeros(1, device=device)
    comm.all_reduce(box)
    box.item()


def _points(
    whole: torch.Tensor, shard: torch.Tensor, call: Callable[..., Any], sizes: list[int], seconds: float
) -> list[tuple[int, float]]:
    """`(bytes a hop, seconds of the call)` by size, the smallest in any case, then growing while there is time."""
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
    """Median seconds of one call, each started by all ranks together."""
    device = whole.device
    run = partial(call, whole, shard)
    # The first call of a size sets things up.
    run()
    meet(device)
    times = [timed(run, device)]
    left = max(0.0, deadline - perf_counter()) / 2
    for _ in range(agree(max(0, min(REPEATS - 1, int(left / times[0]))), device)):
        meet(device)
        times.append(timed(run, device))
    return median(times)
