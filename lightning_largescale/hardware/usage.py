"""What this process holds on its device tier, now and at its highest since a moment: resident memory on CPU,
allocations on CUDA.

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
    """Bytes this process holds now on its device tier: resident memory (kind "cpu"), what tensors have on CUDA."""
    if kind == "cuda":
        return torch.cuda.memory_allocated()
    try:
        # Between two steps, psutil would take longer than a small step.
        pages = _STATM.read_bytes().split()[1]
    except OSError:
        return int(psutil.Process().memory_info().rss)
    return int(pages) * mmap.PAGESIZE


def available_bytes(kind: str, free_bytes: int) -> int:
    """Bytes of its device tier that this process's next tensors may have, of which the system has `free_bytes` free: on
    CUDA what the allocator may take of these, and what it keeps.

    Source: torch.cuda.set_per_process_memory_fraction.
    """
    if kind != "cuda":
        return free_bytes
    reserved, (_, total) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, min(free_bytes, allowed - reserved)) + reserved - torch.cuda.memory_allocated()


def start_peak(kind: str) -> None:
    """Begin the span that `peak_bytes` tells of; where the system cannot reset it, the span is the process's life."""
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")


def peak_bytes(kind: str) -> int | None:
    """The most bytes held at once since `start_peak`, in the sense of `held_bytes`; None where the system does not
    tell.
    """
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def release_free_memory() -> None:
    """Give what was freed back to the system: unreachable objects, and the holes in the heap where glibc keeps it."""
    gc.collect()
    trim_heap()


class HeapTrimmer:
    """Gives the holes in the heap back to the system now and then, at no more than `share` of the time.

    Steps that allocate and free tensors of many sizes leave holes that glibc keeps, and a process that grows for it.

    Args:
        share: of the time between two calls that giving back may take.

    Source: man page malloc_trim(3).
    """

    def __init__(self, share: float = 0.02) -> None:
        self._share, self._due = share, 0.0

    def __call__(self) -> None:
        """Trim, unless that would be too soon."""
        began = monotonic()
        if began >= self._due:
            trim_heap()
            ended = monotonic()
            self._due = ended + (ended - began) / self._share


def trim_heap() -> None:
    """Give the holes in the heap back to the system, where glibc keeps it.

    Source: man page malloc_trim(3).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return
    trim(0)


def expect_pages(tensor: Tensor) -> None:
    """Have the system read the memory of `tensor`, of a mapped file, now, and nothing beyond it: left to itself it
    reads ahead, of each slice megabytes that nobody asks for.

    Source: man page madvise(2), MADV_RANDOM and MADV_WILLNEED.
    """
    start, end = _span(tensor)
    start, end = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    _advise(start, end, "MADV_RANDOM")
    _advise(start, end, "MADV_WILLNEED")


def forget_pages(tensor: Tensor) -> None:
    """Let the system take back the memory of `tensor`, of a mapped file: its pages are read again when they are asked
    for, and what was written into them is lost.

    Source: man page madvise(2), MADV_DONTNEED.
    """
    start, end = _span(tensor)
    # Whole pages, since others may have the rest.
    _advise(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE, "MADV_DONTNEED")


class Resting(Protocol):
    """Memory that may map a file, and then be taken back at any time."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` views it while it maps the file."""

    def rest(self, tensor: Tensor) -> None:
        """Let the system take back what reading or writing `tensor` has brought into memory."""


# All there is of it in this process.
resting: weakref.WeakSet[Resting] = weakref.WeakSet()


def let_rest(tensor: Tensor) -> None:
    """Let the system take back the memory of `tensor`, which was read or written, where a file has what is in it."""
    for memory in _resting_with(tensor):
        memory.rest(tensor)


def at_rest(tensor: Tensor) -> bool:
    """Whether a file has what is in `tensor`, and its memory may be taken back at any time."""
    return bool(_resting_with(tensor))


def _resting_with(tensor: Tensor) -> list[Resting]:
    if tensor.device.type != "cpu" or not tensor.numel():
        return []
    return [memory for memory in [*resting] if memory.holds(tensor)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of `tensor` and of that after its last."""
    if not tensor.numel():
        return 0, 0
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _advise(start: int, end: int, advice: str) -> None:
    if start < end and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))
