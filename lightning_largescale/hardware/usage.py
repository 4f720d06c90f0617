"""Memory usage of this process on its device tier, current and peak: resident memory on CPU, allocations on CUDA.

Source: Linux man page proc(5), `/proc/PID/clear_refs` (5 resets the peak) and `VmHWM`;
torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import sys
import weakref
from pathlib import Path
from time import monotonic
from typing import Protocol

import psutil
import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def held_bytes(kind: str) -> int:
    """Return the bytes this process holds on its device tier: resident memory on CPU, allocated tensors on CUDA."""
    if kind == "cuda":
        return torch.cuda.memory_allocated()
    try:
        # This is called between steps, and psutil would take longer than a small step.
        pages = _STATM.read_bytes().split()[1]
    except OSError:
        return int(psutil.Process().memory_info().rss)
    return int(pages) * mmap.PAGESIZE


def available_bytes(kind: str, free_bytes: int) -> int:
    """Return the bytes of the device tier that this process may still allocate, if the system has `free_bytes` free.

    On CUDA these are the free bytes that the allocator may still reserve, and those it has reserved without use.

    Source: torch.cuda.set_per_process_memory_fraction.
    """
    if kind != "cuda":
        return free_bytes
    reserved, (_, total) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, min(free_bytes, allowed - reserved)) + reserved - torch.cuda.memory_allocated()


def start_peak(kind: str) -> None:
    """Reset the peak that `peak_bytes` returns; if the system cannot, the peak is that of the process's lifetime."""
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")


def peak_bytes(kind: str) -> int | None:
    """Return the peak of `held_bytes` since `start_peak`; None if the system does not report it."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def release_free_memory() -> None:
    """Return freed memory to the system: that of unreachable objects, and with glibc the free memory in the heap."""
    gc.collect()
    trim_heap()


class HeapTrimmer:
    """Periodic heap trimming: returns free heap memory to the system, in no more than `share` of the time.

    Steps that allocate and free tensors of many sizes fragment the heap, and glibc keeps the holes, so that the process
    grows.

    Args:
        share: largest share of the time that trimming may take.

    Source: man page malloc_trim(3).
    """

    def __init__(self, share: float = 0.02) -> None:
        self._share, self._due = share, 0.0

    def __call__(self) -> None:
        """Trim the heap, unless it is too soon."""
        began = monotonic()
        if began >= self._due:
            trim_heap()
            ended = monotonic()
            self._due = ended + (ended - began) / self._share


def trim_heap() -> None:
    """Return free memory in the heap to the system; a no-op without glibc.

    Source: man page malloc_trim(3).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)


def expect_pages(tensor: Tensor) -> None:
    """Have the system read the pages of `tensor`, which maps a file, now, and no others.

    By default the system reads ahead megabytes beyond each slice that nobody asks for.

    Source: man page madvise(2), MADV_RANDOM and MADV_WILLNEED.
    """
    start, end = _span(tensor)
    start, end = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    _advise(start, end, "MADV_RANDOM")
    _advise(start, end, "MADV_WILLNEED")


def forget_pages(tensor: Tensor) -> None:
    """Let the system reclaim the pages of `tensor`, which maps a file.

    They are read from the file again on the next access; what was written into them is lost.

    Source: man page madvise(2), MADV_DONTNEED.
    """
    start, end = _span(tensor)
    # Only pages that the tensor fills, because the others may hold other tensors too.
    _advise(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE, "MADV_DONTNEED")


class Resting(Protocol):
    """Memory that may map a file, whose pages the system may then reclaim at any time."""

    def holds(self, tensor: Tensor) -> bool:
        """Return whether `tensor` is a view of this memory while it maps a file."""

    def rest(self, tensor: Tensor) -> None:
        """Let the system reclaim the pages that reading or writing `tensor` has brought into memory."""


# All such memory in this process.
resting: weakref.WeakSet[Resting] = weakref.WeakSet()


def let_rest(tensor: Tensor) -> None:
    """Let the system reclaim the memory of `tensor`, after it was read or written, if it is backed by a file."""
    for memory in _resting_with(tensor):
        memory.rest(tensor)


def at_rest(tensor: Tensor) -> bool:
    """Return whether `tensor` is backed by a file, so that its memory may be reclaimed at any time."""
    return bool(_resting_with(tensor))


def _resting_with(tensor: Tensor) -> list[Resting]:
    if tensor.device.type != "cpu" or not tensor.numel():
        return []
    return [memory for memory in [*resting] if memory.holds(tensor)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of `tensor` and of the byte after its last."""
    if not tensor.numel():
        return 0, 0
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _advise(start: int, end: int, advice: str) -> None:
    if start < end and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))
