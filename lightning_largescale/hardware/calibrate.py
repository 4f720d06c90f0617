"""Rates of this machine, measured while all ranks work at once, and cached.

Ranks of a node share its cores, memory and disks, so all of them measure the same thing at the same time. The slowest
rank counts, because a synchronous step waits for it. Rank 0 decides for all ranks whether the cache is used.

Source: measure.py and collectives.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import mmap
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lightning_largescale import comm
from lightning_largescale.console import error_console
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.cache import load_rates, store_rates
from lightning_largescale.hardware.collectives import collective_links, hop_sizes, meet
from lightning_largescale.hardware.detect import cpu_name
from lightning_largescale.hardware.hardware import Hardware, Link, Rates
from lightning_largescale.hardware.hops import lone_links
from lightning_largescale.hardware.measure import (
    MatmulSize,
    copy_links,
    default_sizes,
    disk_rates,
    fresh_memory,
    matmul_rates,
    memory_bandwidth,
)
from lightning_largescale.hardware.memory_limits import machine_memory
from lightning_largescale.hardware.usage import available_bytes, release_free_memory

_log = logging.getLogger(__name__)

# Share of the time for each part; the rest is for what happens between the parts.
_SHARES = {
    "matrix products": 0.35,
    "memory": 0.06,
    "fresh memory": 0.06,
    "host memory": 0.06,
    "copies": 0.06,
    "disk": 0.13,
    "collectives": 0.3,
}
# Scratch tensors take at most this fraction of the free memory, so that measuring does not run out of memory.
_SCRATCH_PART = 16

# The measurements of one rank: fields of Rates.
Found = dict[str, Any]


def calibrate(
    hardware: Hardware,
    *,
    seconds: float = 5.0,
    progress: bool = True,
    matmul_sizes: Sequence[MatmulSize] | None = None,
) -> Hardware:
    """Implement `Hardware.calibrate`, whose docstring has the arguments and errors.

    Source: the module's docstring.
    """
    sizes = _check(hardware, seconds, matmul_sizes)
    fingerprint = _fingerprint(hardware, seconds, sizes)
    grouped = _grouped(hardware)
    rates = _from_rank_0(lambda: load_rates(fingerprint), grouped)
    if rates is None:
        rates = _measure(hardware, seconds, sizes, progress=progress)
        # Memory that measuring left in the heap must not count as the process's own.
        release_free_memory()
        if _rank(grouped) == 0:
            store_rates(fingerprint, rates)
    return dataclasses.replace(hardware, rates=rates)


def _check(hardware: Hardware, seconds: float, sizes: Sequence[MatmulSize] | None) -> tuple[MatmulSize, ...]:
    if hardware.origin != "detected":
        raise PlanError(
            f"hardware of origin {hardware.origin!r} cannot be measured, only this machine can; use Hardware.detect()."
        )
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise PlanError(f"seconds={seconds!r} is not accepted; give a number above 0.")
    sizes = default_sizes(hardware.kind) if sizes is None else sizes
    if not isinstance(sizes, Sequence) or not sizes or not all(map(_is_size, sizes)):
        raise PlanError(f"matmul_sizes={sizes!r} is not accepted; give (m, k, n) of whole numbers above 0.")
    if _grouped(hardware) and comm.world_size() != hardware.world_size:
        raise PlanError(
            f"the hardware has {hardware.world_size} ranks and the process group {comm.world_size()};"
            " detect it with the group's environment, ranks_per_node or nodes."
        )
    if not _grouped(hardware) and hardware.nodes > 1:
        raise PlanError(
            f"the links between {hardware.nodes} nodes cannot be measured by one process; calibrate on every rank"
            " with a process group up, as in torchrun or a Trainer."
        )
    return tuple((m, k, n) for m, k, n in sizes)


def _is_size(size: object) -> bool:
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)


def _fingerprint(hardware: Hardware, seconds: float, sizes: Sequence[MatmulSize]) -> dict[str, Any]:
    """Return all that the rates depend on; memory limits are not included."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "memory_bytes": machine_memory()[0],
        "cores": hardware.cores,
        "threads": torch.get_num_threads(),
        "kind": hardware.kind,
        "name": hardware.name,
        "nodes": hardware.nodes,
        "ranks_per_node": hardware.ranks_per_node,
        "interconnect": hardware.interconnect,
        "backend": dist.get_backend() if _grouped(hardware) else None,
        "disk": _disk_folder(hardware),
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "matmul_sizes": [list(size) for size in sizes],
        "seconds": seconds,
    }


def _measure(hardware: Hardware, seconds: float, sizes: Sequence[MatmulSize], *, progress: bool) -> Rates:
    device = torch.device("cuda", torch.cuda.current_device()) if hardware.kind == "cuda" else torch.device("cpu")
    grouped = _grouped(hardware)
    shown = progress and _rank(grouped) == 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _bar(shown) as advance:
        found, error = _alone(hardware, device, seconds, sizes, advance)
        _all_well(error, grouped)
        if grouped:
            advance("collectives")
            found.update(collective_links(found.pop("whole"), found.pop("shard"), _SHARES["collectives"] * seconds))
        elif hardware.world_size > 1:
            advance("collectives")
            found = _shared_out(found, hardware)
            found.update(lone_links(hardware.kind, hardware.ranks_per_node, _SHARES["collectives"] * seconds))
    if device.type == "cuda":
        # The scratch memory would otherwise count as the process's memory from here on.
        torch.cuda.empty_cache()
    return Rates(**_slowest(_from_all(found, grouped)))


def _alone(
    hardware: Hardware,
    device: torch.device,
    seconds: float,
    sizes: Sequence[MatmulSize],
    advance: Callable[[str], None],
) -> tuple[Found, Exception | None]:
    """Measure what a rank measures without communication; return that and the error that stopped it, if any.

    All ranks begin each part together.
    """
    most_bytes = available_bytes(hardware.kind, hardware.memory_free_bytes) // _SCRATCH_PART
    parts: dict[str, Callable[[float], Found]] = {
        "matrix products": lambda left: {"matmul": matmul_rates(device, sizes, left, most_bytes=most_bytes)},
        "memory": lambda left: {"memory_bandwidth": memory_bandwidth(device, left, most_bytes=most_bytes)},
        "disk": lambda left: _disk(_disk_folder(hardware), left),
    }
    if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE"):
        parts["fresh memory"] = lambda left: {"fresh_memory": fresh_memory(left, most_bytes=most_bytes)}
    if device.type == "cuda":
        host = torch.device("cpu")
        parts["host memory"] = lambda left: {
            "host_memory_bandwidth": memory_bandwidth(host, left, most_bytes=most_bytes)
        }
        parts["copies"] = lambda left: _copies(device, left, most_bytes)
    if _grouped(hardware):
        parts["scratch"] = lambda left: _scratch(device, most_bytes)
    found: Found = {}
    error: Exception | None = None
    for name, part in parts.items():
        advance(name)
        if _grouped(hardware):
            meet(device)
        try:
            # After a failure this rank measures nothing more, but still joins the synchronization of the others.
            found.update(part(_SHARES.get(name, 0.0) * seconds) if error is None else {})
        except Exception as caught:
            error = caught
    return found, error


def _copies(device: torch.device, seconds: float, most_bytes: int) -> Found:
    to_device, to_host = copy_links(device, seconds, most_bytes=most_bytes)
    return {"host_to_device": to_device, "device_to_host": to_host}


def _disk(folder: str, seconds: float) -> Found:
    """Measure the disk's rates; return nothing if it takes no O_DIRECT or is full, which is no error."""
    try:
        read, write = disk_rates(folder, seconds)
    except OSError as error:
        _log.info("The disk of %s is not measured: %s.", folder, error)
        return {}
    return {"disk_read": read, "disk_write": write}


def _scratch(device: torch.device, most_bytes: int) -> Found:
    """Allocate tensors for the collectives, early, so that a rank without memory fails before the first collective."""
    ranks = comm.world_size()
    count = hop_sizes(ranks, most_bytes)[-1] // 4
    return {"whole": torch.zeros(ranks * count, device=device), "shard": torch.zeros(count, device=device)}


def _disk_folder(hardware: Hardware) -> str:
    """Return a folder on the best disk for the nvme tier; the temporary folder if there is no such disk."""
    return next((disk.path for disk in hardware.disks if disk.refused is None), tempfile.gettempdir())


def _shared_out(found: Found, hardware: Hardware) -> Found:
    """Divide what a process measured alone on its node among the node's ranks."""
    ranks = hardware.ranks_per_node
    shared = ["disk_read", "disk_write", "host_memory_bandwidth"]
    shared += ["memory_bandwidth", "fresh_memory"] if hardware.kind == "cpu" else []
    found = {name: value / ranks if name in shared else value for name, value in found.items()}
    if hardware.kind == "cpu":
        found["matmul"] = {name: rate / ranks for name, rate in found["matmul"].items()}
    return found


def _slowest(ranks: Sequence[Found]) -> Found:
    """Return every rate of its slowest rank, without those that a rank could not measure."""
    common = set.intersection(*(set(found) for found in ranks))
    return {name: _slower([found[name] for found in ranks]) for name in common}


def _slower(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Link):
        return Link(
            latency_seconds=max(link.latency_seconds for link in values),
            bandwidth=min(link.bandwidth for link in values),
        )
    if isinstance(values[0], Mapping):
        common = [name for name in values[0] if all(name in rates for rates in values)]
        return {name: min(rates[name] for rates in values) for name in common}
    return min(values)


def _grouped(hardware: Hardware) -> bool:
    """Return whether the ranks of `hardware` measure together; a single rank measures alone, whatever the group."""
    return dist.is_available() and dist.is_initialized() and hardware.world_size > 1


def _rank(grouped: bool) -> int:
    return comm.rank() if grouped else 0


def _from_rank_0(get: Callable[[], Rates | None], grouped: bool) -> Rates | None:
    """Call `get` on rank 0 and return its result on every rank."""
    own = get() if _rank(grouped) == 0 else None
    return comm.broadcast_object(own) if grouped else own


def _from_all(value: Any, grouped: bool) -> list[Any]:
    """Return every rank's `value` on every rank."""
    return comm.all_gather_object(value) if grouped else [value]


def _all_well(error: Exception | None, grouped: bool) -> None:
    """Raise on every rank if one failed, before another rank waits for it in a collective."""
    messages = _from_all(None if error is None else f"{type(error).__name__}: {error}", grouped)
    for rank, message in enumerate(messages):
        if message is not None and (error is None or rank == _rank(grouped)):
            raise RuntimeError(f"rank {rank} failed while the hardware was measured ({message}).") from error


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that reports the part that begins, shown on rank 0 if stderr is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn

    console = error_console()
    if not shown or not console.is_terminal:
        yield lambda part: None
        return
    columns = (TextColumn("Measuring the hardware:"), BarColumn(), TextColumn("{task.description}"))
    # No automatic refresh: its thread would take a core from the measurement.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=len(_SHARES) + 1)

        def advance(part: str) -> None:
            bar.update(task, advance=1, description=part, refresh=True)

        yield advance
