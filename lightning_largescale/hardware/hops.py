"""Links between the ranks of one node, measured by a single process without a process group.

On CPU the collectives are gloo's own, between threads of this process instead of processes: the same bytes over the
same loopback device. On CUDA a hop of a ring is measured as a copy from one device to the next.

Source: torch.distributed.ProcessGroupGloo; the CUDA Programming Guide, "Peer-to-Peer Memory Access".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.hardware import Link
from lightning_largescale.hardware.measure import fit_link, timed

_HOP_BYTES = (2**10, 2**15, 2**19, 2**22)
_REPEATS = 5
# A link describes one hop, so a few ranks suffice to measure it; more would only share the cores further.
_MOST_RANKS = 4
_TIMEOUT_SECONDS = 20.0


def lone_links(kind: str, ranks: int, seconds: float) -> dict[str, Link]:
    """Measure the links of all-gather, reduce-scatter and all-reduce among `ranks` processes of this node.

    Args:
        kind: the kind of device, "cpu" or "cuda".
        ranks: number of processes of the node, 2 or more.
        seconds: time after which no larger message is begun.

    Raises:
        PlanError: the links cannot be measured here, for lack of a second CUDA device or of gloo.

    Source: the module's docstring.
    """
    if kind == "cuda" and torch.cuda.device_count() > 1:
        link = _between_devices()
        return dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), link)
    if kind == "cuda" or not dist.is_gloo_available():
        raise PlanError(
            f"the links of {ranks} ranks cannot be measured by one process here; calibrate on every rank with a process"
            " group up, as in torchrun or a Trainer."
        )
    return _between_threads(min(ranks, _MOST_RANKS), seconds)


def _between_devices() -> Link:
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    source = torch.zeros(_HOP_BYTES[-1], dtype=torch.uint8, device=here)
    target = torch.zeros(_HOP_BYTES[-1], dtype=torch.uint8, device=there)

    def seconds_of(size: int) -> float:
        def copy() -> None:
            target[:size].copy_(source[:size])
            torch.cuda.synchronize(there)

        copy()
        return median(timed(copy, here) for _ in range(_REPEATS))

    return fit_link([(size, seconds_of(size)) for size in _HOP_BYTES])


def _between_threads(ranks: int, seconds: float) -> dict[str, Link]:
    gloo: Any = dist  # its stubs lack what is used of gloo here
    store, together, errors = gloo.HashStore(), threading.Barrier(ranks), list[Exception]()
    points: dict[str, list[tuple[int, float]]] = {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
    deadline = perf_counter() + seconds

    def rank(index: int) -> None:
        try:
            group = gloo.ProcessGroupGloo(store, index, ranks, timedelta(seconds=_TIMEOUT_SECONDS))
            for size in _HOP_BYTES:
                for name, (hops, call) in _calls(group, size).items():
                    taken = _seconds(call, together)
                    if index == 0:
                        points[name].append((size, taken / hops))
                # Rank 0 decides to stop for all, while the others wait for it.
                if index == 0 and perf_counter() > deadline:
                    points["over"] = []
                together.wait(_TIMEOUT_SECONDS)
                if "over" in points:
                    return
        except Exception as error:
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: fit_link(found) for name, found in points.items() if found}


def _calls(group: Any, size: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return the number of hops and the call of each collective whose hop carries `size` bytes."""
    ranks = group.size()
    whole, shard = torch.zeros(ranks * size // 4), torch.zeros(size // 4)
    shards = list(whole.chunk(ranks))
    return {
        "all_gather": (ranks - 1, lambda: group.allgather([shards], [shard]).wait()),
        "reduce_scatter": (ranks - 1, lambda: group.reduce_scatter([shard], [shards]).wait()),
        "all_reduce": (2 * (ranks - 1), lambda: group.allreduce([whole]).wait()),
    }


def _seconds(call: Callable[[], object], together: threading.Barrier) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        together.wait(_TIMEOUT_SECONDS)
        times.append(timed(call, torch.device("cpu")))
    return median(times)
