"""Seconds of compute and of single collectives, at measured rates.

Operations with FLOPs (matrix products, attention, convolutions) cost their FLOPs at the measured matmul rate of their
dtype; all others cost the bytes they read and write at the measured memory bandwidth. Collectives are rings.

Source: Williams et al. 2009, "Roofline", section 3; Thakur et al. 2005, "Optimization of Collective Communication
    Operations in MPICH", section 4 (ring algorithms).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_largescale.hardware import Link, Rates
    from lightning_largescale.workload import Segment


def segment_seconds(segment: Segment, rates: Rates, dtype: str, *, backward: bool) -> float:
    """Return the seconds of one segment's forward or backward.

    Args:
        segment: the segment.
        rates: the rates of the hardware.
        dtype: data type of the matrix products.
        backward: whether it is the backward.

    Raises:
        ValueError: the rate of these matrix products is not known.
    """
    rate = rates.matmul_rate(dtype)
    if rate is None:
        raise ValueError(f"the hardware has no rate of matrix products in {dtype}.")
    flops = segment.backward_flops if backward else segment.forward_flops
    moved = segment.backward_moved_bytes if backward else segment.forward_moved_bytes
    return flops / rate + moved / rates.memory_bandwidth


def all_gather_seconds(shard_bytes: int, ranks: int, link: Link | None) -> float:
    """Return the seconds of one ring all-gather that overlaps with nothing.

    Args:
        shard_bytes: bytes that each rank contributes, padding included; every rank ends with `ranks * shard_bytes`.
        ranks: size of the mesh axis; 1 costs 0 s.
        link: latency (seconds per hop) and bandwidth (bytes per second, one direction) of the slowest pair.

    Source: Thakur et al. 2005, section 4.1: (p-1) (latency + shard / bandwidth).
    """
    return _ring_seconds(shard_bytes, ranks - 1, link)


def reduce_scatter_seconds(shard_bytes: int, ranks: int, link: Link | None) -> float:
    """Return the seconds of one ring reduce-scatter with a result of `shard_bytes` per rank.

    Arguments as for `all_gather_seconds`.

    Source: Thakur et al. 2005, section 4.2: (p-1) (latency + shard / bandwidth), the arithmetic inside the measured
        bandwidth.
    """
    return _ring_seconds(shard_bytes, ranks - 1, link)


def all_reduce_seconds(whole_bytes: int, ranks: int, link: Link | None) -> float:
    """Return the seconds of one ring all-reduce of `whole_bytes`; arguments as for `all_gather_seconds`.

    Source: Thakur et al. 2005, section 4.5: a reduce-scatter and an all-gather, 2 (p-1) hops of whole / p bytes.
    """
    return _ring_seconds(whole_bytes // max(1, ranks), 2 * (ranks - 1), link)


def shared(link: Link | None, groups: int) -> Link | None:
    """Return `link` as each of `groups` groups has it that leave a node together."""
    return link and dataclasses.replace(link, bandwidth=link.bandwidth / groups)


def _ring_seconds(hop_bytes: int, hops: int, link: Link | None) -> float:
    if hops <= 0:
        return 0.0
    if link is None:
        raise ValueError("the hardware lacks a link that the plan communicates over; calibrate it with all ranks.")
    return hops * (link.latency_seconds + hop_bytes / link.bandwidth)
