"""Memory at fixed addresses, that is in DRAM or in a file by turns.

A region of address space stays where it is, and so do the tensors that view it: what changes is what lies behind. At
rest it maps a stretch of the store's file: whoever reads it, a checkpoint or a callback, gets its values through the
page cache, and the system may take the pages back at any time. Before it is needed it becomes ordinary memory, into
which a request past the page cache reads; after that it maps the file again. So nothing depends on being told of every
use: what is not fetched is slower, never wrong.

Source: man pages mmap(2), MAP_FIXED, and madvise(2), MADV_HUGEPAGE.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.hardware import usage
from lightning_largescale.offload.store import Store, Transfer
from lightning_largescale.tiers import ALIGNMENT_BYTES, aligned

# Pages of this size are handed out and filled at the rate of a fast disk, those of 4 KiB are not.
_HUGE_BYTES = 2 * 2**20
_PRIVATE, _SHARED, _FIXED, _ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, 0x10, mmap.MAP_ANONYMOUS
_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Memory:
    """Ordinary memory, aligned as O_DIRECT wants it and in huge pages where the system has them.

    Args:
        nbytes: its size, rounded up to a multiple of `ALIGNMENT_BYTES`.
        pinned: whether CUDA copies to and from it directly.

    Attributes:
        nbytes: its size.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.nbytes = aligned(max(nbytes, 1))
        reserved = self.nbytes + _HUGE_BYTES
        start = _map(None, reserved, _NO_ACCESS, _PRIVATE | _ANONYMOUS)
        self._address = -(-start // _HUGE_BYTES) * _HUGE_BYTES
        self._bytes = _bytes_type(self.nbytes).from_address(self._address)
        # Tensors keep the bytes alive, and these the addresses.
        weakref.finalize(self._bytes, _unmap, start, reserved).atexit = False
        self._begin()
        if pinned:
            _pin(self._bytes, self._address, self.nbytes)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], start: int = 0) -> Tensor:
        """A view of it as a tensor, contiguous.

        Args:
            dtype: of the tensor.
            shape: of the tensor.
            start: its first byte in the memory.
        """
        if not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self._bytes, dtype=dtype, count=math.prod(shape), offset=start)
        return flat.view(tuple(shape))

    def view(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Its bytes from `start` to `stop`, for requests."""
        stop = self.nbytes if stop is None else stop
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes {start} to {stop} of {self.nbytes} are asked for")
        return memoryview(self._bytes).cast("B")[start:stop]

    def lend(self, back: Callable[[Memory], object]) -> tuple[Tensor, memoryview]:
        """All of it as a tensor of bytes, and for requests; `back` is called with it once nothing has either any more:
        no view of the tensor, and no request that is under way.
        """
        lent = _bytes_type(self.nbytes).from_buffer(self._bytes)
        weakref.finalize(lent, back, self).atexit = False
        return torch.frombuffer(lent, dtype=torch.uint8), memoryview(lent).cast("B")

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` views it."""
        return self._address <= tensor.data_ptr() < self._address + self.nbytes

    def start_of(self, tensor: Tensor) -> int:
        """Where in it `tensor` begins, in bytes."""
        return tensor.data_ptr() - self._address

    def _begin(self) -> None:
        self._to_dram()

    def _to_dram(self, start: int = 0, stop: int | None = None) -> None:
        length = (self.nbytes if stop is None else stop) - start
        _map(self._address + start, length, _READ_WRITE, _FIXED | _PRIVATE | _ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Without huge pages it is slower, and that is all.
            _advise(self._address + start, length, mmap.MADV_HUGEPAGE)


class Region(Memory):
    """Memory that is in DRAM, or at rest in a file of a store; it begins at rest, as zeros.

    Once the store is closed it stays where it is. The methods wait for what an earlier one has begun wherever they
    would get in its way.

    Args:
        store: on the disk; None for what never leaves DRAM, of which the methods below have nothing to do.
        name: of what is kept in it, for messages.
        nbytes: its size.
        pinned: as of `Memory`, of what never leaves DRAM.

    Attributes:
        in_dram: whether it is.

    Raises:
        PlanError: the disk has not as many bytes.
    """

    def __init__(self, store: Store | None, name: str, nbytes: int, *, pinned: bool = False) -> None:
        self._store, self.in_dram = store, True
        self._fetched = Transfer()
        self._saved: list[Transfer] = []
        if store is not None:
            self._extent = store.reserve(name, nbytes)
        super().__init__(nbytes, pinned=pinned and store is None)
        if store is not None:
            usage.resting.add(self._mapping)

    def fetch(self) -> Transfer:
        """Begin to bring it into DRAM; its values are there when the transfer is over. Where it fails, `wait` puts the
        region to rest again.
        """
        if self.in_dram:
            return self._fetched
        store = self._open_store()
        if store is None:
            return Transfer()
        self.claim()
        try:
            self._fetched = store.read(self._extent, self.view())
        except BaseException:
            self._rest()
            raise
        self._fetched.on_failure(self._rest)
        return self._fetched

    def claim(self) -> None:
        """Have it in DRAM at once, with no values."""
        if self.in_dram:
            self._fetched.wait()
        else:
            self._to_dram()
            self._fetched, self.in_dram, self._mapping.maps = Transfer(), True, False

    def save(self, start: int = 0, stop: int | None = None) -> Transfer:
        """Begin to write what is in DRAM to the file, from byte `start` to `stop`, each rounded to what O_DIRECT
        takes; it stays in DRAM.
        """
        store = self._open_store()
        if store is None or not self.in_dram:
            return Transfer()
        self._fetched.wait()
        first = start // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        last = self.nbytes if stop is None else min(self.nbytes, aligned(stop))
        transfer = store.write(self._extent, self.view(first, last), first)
        self._saved = [*(saved for saved in self._saved if not saved.over), transfer]
        return transfer

    def drop(self) -> None:
        """Let the file alone have it: what is in DRAM and was not saved is lost.

        Raises:
            StoreError: a save that was under way failed; then it stays in DRAM.
        """
        if self._open_store() is None or not self.in_dram:
            return
        saved, self._saved = self._saved, []
        # All of them, before the first failure is told: then nothing is written from this memory any more.
        Transfer.of(saved).wait()
        self._fetched.wait()
        self._rest()

    def keep(self, start: int, stop: int) -> None:
        """Have bytes `start` to `stop`, of a region that is at rest and stays so, in DRAM for good: as zeros."""
        if self._store is not None and start < stop:
            self._to_dram(start, stop)
            self._mapping.kept.append((start, stop))

    def read_into(self, memory: Memory, start: int, stop: int, at: int = 0) -> Transfer:
        """Begin to read bytes `start` to `stop` of it into `memory` from its byte `at` on, all of them multiples of
        `ALIGNMENT_BYTES`.
        """
        store = self._open_store()
        if store is None or self.in_dram:
            self._fetched.wait()
            memory.view(at, at + stop - start)[:] = self.view(start, stop)
            return Transfer()
        return store.read(self._extent, memory.view(at, at + stop - start), start)

    def write_from(self, memory: Memory, start: int, stop: int, at: int = 0) -> Transfer:
        """Begin to write bytes `start` to `stop` of it from `memory`, from its byte `at` on, all of them multiples of
        `ALIGNMENT_BYTES`; in the file, and in DRAM where it is.
        """
        store = self._open_store()
        if store is None or self.in_dram:
            self._fetched.wait()
            self.view(start, stop)[:] = memory.view(at, at + stop - start)
            if store is None:
                return Transfer()
        return store.write(self._extent, memory.view(at, at + stop - start), start)

    def _begin(self) -> None:
        self._mapping = _Mapping(self._address, self.nbytes)
        # For as long as tensors view the memory, whatever becomes of the region.
        self._bytes.mapping = self._mapping
        # Through DRAM, it would have to be within the limits of that.
        if self._store is None:
            self._to_dram()
        else:
            self._rest()

    def _open_store(self) -> Store | None:
        return None if self._store is None or self._store.closed else self._store

    def _rest(self) -> None:
        store = self._open_store()
        if store is not None:
            _map(
                self._address,
                self.nbytes,
                _READ_WRITE,
                _FIXED | _SHARED,
                store.descriptor,
                self._extent.offset,
            )
            self._fetched, self.in_dram, self._mapping.maps = Transfer(), False, True


class _Mapping:
    """What is known of a region's memory by those who have tensors of it alone.

    Attributes:
        kept: first bytes, and those after the last, of what stays in DRAM while the rest maps the file.
        maps: whether it maps the file.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self._address, self._nbytes = address, nbytes
        self.kept: list[tuple[int, int]] = []
        self.maps = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` views it while it maps the file."""
        return self.maps and self._address <= tensor.data_ptr() < self._address + self._nbytes

    def rest(self, tensor: Tensor) -> None:
        """Let the system take back what reading or writing `tensor` has brought into memory."""
        start = tensor.data_ptr() - self._address
        # Whole pages, since others may have the rest.
        first, last = aligned(start), (start + tensor.nbytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if first < last and not any(begin < last and first < end for begin, end in self.kept):
            _advise(self._address + first, last - first, mmap.MADV_DONTNEED)


@functools.cache
def _bytes_type(nbytes: int) -> Any:
    """A type of ctypes arrays whose end may be watched."""
    return type("Bytes", (ctypes.c_char * nbytes,), {})


def _map(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int = -1, offset: int = 0) -> int:
    found = _libc().mmap(
        ctypes.c_void_p(address), nbytes, protection, flags | getattr(mmap, "MAP_NORESERVE", 0), descriptor, offset
    )
    if found in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {nbytes} bytes failed: {os.strerror(number)}")
    return int(found)


def _advise(address: int, nbytes: int, advice: int) -> None:
    _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)


def _unmap(address: int, nbytes: int) -> None:
    _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc


def _pin(owner: Any, address: int, nbytes: int) -> None:
    """Lock the memory for copies of CUDA, until it is gone."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
    device, process = torch.cuda.current_device(), os.getpid()
    weakref.finalize(owner, _unpin, address, device, process).atexit = False


def _unpin(address: int, device: int, process: int) -> None:
    # A fork has the memory, and not what was registered.
    if os.getpid() != process:
        return
    try:
        # Copies that nobody waits for may be under way.
        torch.cuda.synchronize(device)
    finally:
        # Also where the device has failed: the address is other memory's soon.
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        cudart.cudaHostUnregister(address)
