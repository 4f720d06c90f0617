"""Rates of one process, measured within a time limit: matrix products, memory, copies to and from the device, disk.

Each measurement takes medians of a few repeats, and returns early once it has enough of them. It starts small, because
an operation may be a hundred times slower than expected, as bfloat16 products are on a CPU without such instructions.

Source: McCalpin 1995, "Memory Bandwidth and Machine Balance in Current High Performance Computers" (STREAM); fio(1),
direct=1.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from time import perf_counter

import torch

from lightning_largescale.hardware.disks import direct_file
from lightning_largescale.hardware.hardware import Link
from lightning_largescale.hardware.probe import survives
from lightning_largescale.tiers import REQUEST_BYTES, REQUESTS

MatmulSize = tuple[int, int, int]

REPEATS = 9

# A product of this many FLOPs takes a few milliseconds at the slowest rate seen (0.9 GFLOP/s).
_FIRST_FLOPS = 2 * 128**3
# From this size on, the time of a product predicts that of a larger one.
_TELLING_FLOPS = 2**27
# Small products and large ones are computed by different instructions.
_PROBED_EDGES = (32, 256)
# Larger than caches; on CUDA so large that a kernel's launch, of a few microseconds, does not count.
_STREAM_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
_FRESH_BYTES = 32 * 2**20
_COPY_BYTES = (2**16, 2**20, 2**24, 2**26)
# The requests that the nvme tier makes: a few large ones at once.
_REQUEST_BYTES, _REQUEST_THREADS = REQUEST_BYTES, REQUESTS


def default_sizes(kind: str) -> tuple[MatmulSize, ...]:
    """Return the `(m, k, n)` to measure if the workload's are not known: a cube that fills the device."""
    edge = 4096 if kind == "cuda" else 1024
    return ((edge, edge, edge),)


def matmul_rates(
    device: torch.device, sizes: Sequence[MatmulSize], seconds: float, *, most_bytes: int
) -> dict[str, float]:
    """Measure the FLOP/s of matrix products by dtype name; for several sizes, their total FLOPs by their total time.

    A dtype whose products end the process on this machine is left out.

    Args:
        device: the device to measure.
        sizes: `(m, k, n)` of each product. A product that would take too long, or too much memory, is measured at a
            half, a quarter, ... of every edge.
        seconds: time for all measurements.
        most_bytes: upper bound of the bytes of operands and result.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.float32]
    if device.type == "cpu" and survives(lambda: [_product(torch.bfloat16, edge) for edge in _PROBED_EDGES]):
        dtypes.append(torch.bfloat16)
    share = seconds / len(dtypes) / len(sizes)
    flops = sum(2 * m * k * n for m, k, n in sizes)
    rates = {}
    for dtype in dtypes:
        spent = sum(2 * m * k * n / _matmul_rate(device, dtype, (m, k, n), share, most_bytes) for m, k, n in sizes)
        rates[str(dtype).removeprefix("torch.")] = flops / spent
    return rates


def memory_bandwidth(device: torch.device, seconds: float, *, most_bytes: int) -> float:
    """Measure the bytes per second of `x.add_(y)` on tensors larger than the cache: two reads and a write per element.

    Args:
        device: the device whose memory is measured.
        seconds: time for the measurement.
        most_bytes: upper bound of the bytes of both tensors.
    """
    count = max(1, min(_STREAM_BYTES[device.type], most_bytes // 2) // 4)
    x, y = torch.ones(count, device=device), torch.ones(count, device=device)
    return 3 * 4 * count / _median_seconds(lambda: x.add_(y), seconds, device)


def fresh_memory(seconds: float, *, most_bytes: int) -> float:
    """Measure the bytes per second at which the system hands out memory that is written for the first time.

    The time is that of the first write to newly mapped memory, less that of a second write: page faults, and zeroing by
    the system.

    Args:
        seconds: time for the measurement.
        most_bytes: upper bound of the bytes mapped at once.
    """
    size = max(mmap.PAGESIZE, min(_FRESH_BYTES, most_bytes) // mmap.PAGESIZE * mmap.PAGESIZE)
    deadline = perf_counter() + seconds
    extra: list[float] = []
    while len(extra) < REPEATS and (not extra or perf_counter() < deadline):
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            first, again = _write_seconds(memory), _write_seconds(memory)
        # On a busy machine the second write may take longer; at least a hundredth of the first is then counted.
        extra.append(max(first - again, first / 100))
    return size / median(extra)


def _write_seconds(memory: mmap.mmap) -> float:
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    began = perf_counter()
    tensor.fill_(1)
    taken = perf_counter() - began
    # The mapping cannot be closed while the tensor exists.
    del tensor
    return taken


def copy_links(device: torch.device, seconds: float, *, most_bytes: int) -> tuple[Link, Link]:
    """Measure the links of pinned-memory copies from host to a CUDA device, and back.

    Args:
        device: a CUDA device.
        seconds: time for both directions.
        most_bytes: upper bound of the bytes of the largest copy.
    """
    sizes = [size for size in _COPY_BYTES if size <= most_bytes] or [_COPY_BYTES[0]]
    host = torch.empty(sizes[-1], dtype=torch.uint8, pin_memory=True)
    there = torch.empty(sizes[-1], dtype=torch.uint8, device=device)
    share = seconds / 2 / len(sizes)

    def link(source: torch.Tensor, target: torch.Tensor) -> Link:
        return fit_link([(size, seconds_of(source[:size], target[:size])) for size in sizes])

    def seconds_of(source: torch.Tensor, target: torch.Tensor) -> float:
        return _median_seconds(lambda: target.copy_(source, non_blocking=True), share, device)

    return link(host, there), link(there, host)


def disk_rates(folder: str, seconds: float) -> tuple[float, float]:
    """Measure the bytes per second read and overwritten with O_DIRECT in `folder`, by a few large requests at once.

    The file has no name, so that it is removed whatever happens.

    Raises:
        OSError: the folder takes no O_DIRECT, is not writable, or is full.
    """
    deadline = perf_counter() + seconds
    with (
        direct_file(folder) as descriptor,
        ThreadPoolExecutor(_REQUEST_THREADS) as pool,
        mmap.mmap(-1, _REQUEST_BYTES * _REQUEST_THREADS) as memory,
        memoryview(memory) as view,
    ):
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # As in the nvme tier: into small pages a fast disk reads at half its rate.
            memory.madvise(mmap.MADV_HUGEPAGE)
        # Random bytes, because some file systems do not store zeros.
        view[:] = os.urandom(2**20) * (len(view) // 2**20)
        buffers = [view[i * _REQUEST_BYTES :][:_REQUEST_BYTES] for i in range(_REQUEST_THREADS)]
        try:
            return _disk_rates(descriptor, buffers, pool, deadline)
        finally:
            for buffer in buffers:
                buffer.release()


def fit_link(points: Sequence[tuple[int, float]]) -> Link:
    """Fit the latency and bandwidth of a link to measured hops, by least squares of the relative errors.

    Args:
        points: `(bytes, seconds)` of one hop, for several sizes, seconds above 0.

    Source: Hockney 1994, "The communication challenge for MPP" (latency and asymptotic bandwidth).
    """
    # With relative errors each point counts the same, whether it took microseconds or seconds.
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_size = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    mean_seconds = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (size - mean_size) ** 2 for w, (size, _) in zip(weights, points, strict=True))
    joint = sum(
        w * (size - mean_size) * (seconds - mean_seconds) for w, (size, seconds) in zip(weights, points, strict=True)
    )
    largest, largest_seconds = max(points)
    if spread == 0 or joint <= 0:
        # With one size only, or noise larger than the effect, only the rate of the largest hop is known.
        return Link(latency_seconds=0.0, bandwidth=largest / largest_seconds)
    slope = joint / spread
    latency_seconds = mean_seconds - slope * mean_size
    if latency_seconds < 0:
        squares = sum(w * size**2 for w, (size, _) in zip(weights, points, strict=True))
        slope = sum(w * size * seconds for w, (size, seconds) in zip(weights, points, strict=True)) / squares
        latency_seconds = 0.0
    return Link(latency_seconds=latency_seconds, bandwidth=1 / slope)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the work that `run` starts on `device` is done."""
    synchronize(device)
    start = perf_counter()
    run()
    synchronize(device)
    return max(perf_counter() - start, 1e-9)


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on `device`; a no-op on CPU, which has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _times(run: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    """Return the seconds of up to `REPEATS` runs within `seconds`, at least one, after one warm-up run."""
    deadline = perf_counter() + seconds
    run()
    times = [timed(run, device)]
    while len(times) < REPEATS and perf_counter() + times[-1] < deadline:
        times.append(timed(run, device))
    return times


def _median_seconds(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    return median(_times(run, seconds, device))


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: MatmulSize, seconds: float, most_bytes: int) -> float:
    """Return the FLOP/s at the largest size up to `size` that leaves time for a few repeats."""
    # Warm up: the first product of a process may take as long as the whole time limit.
    one = torch.ones(1, 1, dtype=dtype, device=device)
    timed(partial(torch.mm, one, one), device)
    deadline = perf_counter() + seconds
    # A generator of its own, so that the user's random state does not change.
    generator = torch.Generator(device).manual_seed(0)
    rate, best, growth, measured = 0.0, 0.0, 8.0, 0
    for m, k, n in _ladder(size):
        too_large = (m * k + k * n + m * n) * dtype.itemsize > most_bytes
        # Eight times the FLOPs take eight times as long, or less if a small product is mostly overhead: the growth of
        # the last step is taken. Three runs are the least: a warm-up and two more. Small products predict nothing,
        # because on a busy machine they take as long as their time slice, whatever their size.
        tells = measured >= _TELLING_FLOPS
        too_slow = tells and perf_counter() + 3 * growth * best > deadline
        if rate and (too_large or too_slow):
            break
        a = torch.randn(m, k, dtype=dtype, device=device, generator=generator)
        b = torch.randn(k, n, dtype=dtype, device=device, generator=generator)
        left = max(0.0, deadline - perf_counter())
        times = _times(partial(torch.mm, a, b), left if (m, k, n) == size else left / 8, device)
        measured = 2 * m * k * n
        reached = measured / median(times)
        # Below the wanted size, the best rate so far is the nearest to that of the wanted size.
        rate = reached if (m, k, n) == size else max(rate, reached)
        growth = min(8.0, max(2.0, min(times) / best)) if best else 8.0
        best = min(times)
    return rate


def _product(dtype: torch.dtype, edge: int) -> torch.Tensor:
    square = torch.ones(edge, edge, dtype=dtype)
    return square @ square


def _ladder(size: MatmulSize) -> Iterator[MatmulSize]:
    """Return growing sizes that end with `size`: its edges halved repeatedly, down to few FLOPs."""
    smaller = [size]
    while 2 * smaller[-1][0] * smaller[-1][1] * smaller[-1][2] > _FIRST_FLOPS:
        m, k, n = smaller[-1]
        smaller.append((max(1, m // 2), max(1, k // 2), max(1, n // 2)))
    return reversed(smaller)


def _disk_rates(
    descriptor: int, buffers: list[memoryview], pool: ThreadPoolExecutor, deadline: float
) -> tuple[float, float]:
    def run(request: Callable[..., int], requests: int) -> float:
        start = perf_counter()
        spread = pool.map(
            lambda thread: [
                _whole(request(descriptor, [buffers[thread]], index * _REQUEST_BYTES))
                for index in range(thread, requests, _REQUEST_THREADS)
            ],
            range(_REQUEST_THREADS),
        )
        written = sum(map(sum, spread))
        return written / (perf_counter() - start)

    requests = _REQUEST_THREADS
    started = perf_counter()
    first = run(os.pwritev, requests)
    # Writing a larger file, then a few passes in each direction, should fit into the time that is left.
    while requests < 16 * _REQUEST_THREADS and 8 * requests * _REQUEST_BYTES / first < deadline - started:
        requests *= 4
    if requests > _REQUEST_THREADS:
        run(os.pwritev, requests)
    reads, writes = [run(os.preadv, requests)], [run(os.pwritev, requests)]
    while (
        len(reads) < REPEATS
        and perf_counter() + requests * _REQUEST_BYTES * (1 / reads[-1] + 1 / writes[-1]) < deadline
    ):
        reads.append(run(os.preadv, requests))
        writes.append(run(os.pwritev, requests))
    return median(reads), median(writes)


def _whole(count: int) -> int:
    if count != _REQUEST_BYTES:
        raise OSError(f"{count} of {_REQUEST_BYTES} bytes were moved; is the disk full?")
    return count
