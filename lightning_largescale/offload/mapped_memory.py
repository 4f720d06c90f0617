"""Memory at fixed addresses that is backed by DRAM or by a file in alternation.

A region of address space keeps its addresses, and the tensors that view it stay valid; only its backing changes. At
rest it maps an extent of the store's file: any reader, such as a checkpoint or a callback, gets its values through the
page cache, and the system may reclaim the pages at any time. Before it is needed it becomes ordinary memory, and an
O_DIRECT request reads into it; afterwards it maps the file again. So correctness does not depend on knowing every use:
memory that is not fetched is slower to read, never wrong.

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

# The system allocates and fills huge pages at the rate of a fast disk; pages of 4 KiB are slower.
_HUGE_BYTES = 2 * 2**20
_PRIVATE, _SHARED, _FIXED, _ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, 0x10, mmap.MAP_ANONYMOUS
_NO_ACCESS, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Memory:
    """Ordinary memory, aligned for O_DIRECT, and in huge pages if the system has them.

    Args:
        nbytes: The size in bytes; rounded up to a multiple of `ALIGNMENT_BYTES`.
        pinned: Whether to pin the memory for CUDA copies.

    Attributes:
        nbytes: The rounded size in bytes.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.nbytes = aligned(max(nbytes, 1))
        reserved = self.nbytes + _HUGE_BYTES
        start = _map(None, reserved, _NO_ACCESS, _PRIVATE | _ANONYMOUS)
        self._address = -(-start // _HUGE_BYTES) * _HUGE_BYTES
        self._bytes = _bytes_type(self.nbytes).from_address(self._address)
        # Tensors keep the bytes object alive, and the bytes object keeps the address range mapped.
        weakref.finalize(self._bytes, _unmap, start, reserved).atexit = False
        self._begin()
        if pinned:
            _pin(self._bytes, self._address, self.nbytes)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], start: int = 0) -> Tensor:
        """Return a contiguous tensor that views the memory.

        Args:
            dtype: The tensor's dtype.
            shape: The tensor's shape.
            start: The first byte of the tensor in the memory.
        """
        if not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer(self._bytes, dtype=dtype, count=math.prod(shape), offset=start)
        return flat.view(tuple(shape))

    def view(self, start: int = 0, stop: int | None = None) -> memoryview:
        """Return the bytes from `start` to `stop`, for requests."""
        stop = self.nbytes if stop is None else stop
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes {start} to {stop} of {self.nbytes} are asked for")
        return memoryview(self._bytes).cast("B")[start:stop]

    def lend(self, back: Callable[[Memory], object]) -> tuple[Tensor, memoryview]:
        """Lend the full memory, as a tensor of bytes and as a memoryview for requests.

        Args:
            back: Called with the memory once neither is referenced any more, by a view of the tensor or by a pending
                request.
        """
        lent = _bytes_type(self.nbytes).from_buffer(self._bytes)
        weakref.finalize(lent, back, self).atexit = False
        return torch.frombuffer(lent, dtype=torch.uint8), memoryview(lent).cast("B")

    def holds(self, tensor: Tensor) -> bool:
        """Return whether `tensor` views this memory."""
        return self._address <= tensor.data_ptr() < self._address + self.nbytes

    def start_of(self, tensor: Tensor) -> int:
        """Return the byte in this memory at which `tensor` begins."""
        return tensor.data_ptr() - self._address

    def _begin(self) -> None:
        self._to_dram()

    def _to_dram(self, start: int = 0, stop: int | None = None) -> None:
        length = (self.nbytes if stop is None else stop) - start
        _map(self._address + start, length, _READ_WRITE, _FIXED | _PRIVATE | _ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # The result is not checked: without huge pages the memory is only slower.
            _advise(self._address + start, length, mmap.MADV_HUGEPAGE)


class Region(Memory):
    """Memory that is in DRAM, or at rest in the file of a store. It begins at rest, filled with zeros.

    Once the store is closed, the region stays where it is. Methods wait for transfers of earlier calls if these would
    conflict.

    Args:
        store: The store; None for a region that never leaves DRAM. For such a region `read_into` and `write_from` copy
            at once, and the other methods below have no effect.
        name: The name of the contents, for messages.
        nbytes: The size in bytes.
        pinned: As for `Memory`; only used for a region that never leaves DRAM.

    Attributes:
        in_dram: Whether the region is in DRAM.

    Raises:
        PlanError: The disk has too little free space.
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
        """Begin to read the region into DRAM; its values are valid once the transfer has ended.

        If the transfer fails, its `wait` puts the region to rest again.
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
        """Move the region to DRAM without reading its values; a region that is in DRAM already keeps them."""
        if self.in_dram:
            self._fetched.wait()
        else:
            self._to_dram()
            self._fetched, self.in_dram, self._mapping.maps = Transfer(), True, False

    def save(self, start: int = 0, stop: int | None = None) -> Transfer:
        """Begin to write bytes `start` to `stop` from DRAM to the file; the region stays in DRAM.

        The range is extended to multiples of `ALIGNMENT_BYTES`.
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
        """Put the region to rest: it maps the file again. Values in DRAM that were not saved are lost.

        Raises:
            StoreError: A pending save failed; the region then stays in DRAM.
        """
        if self._open_store() is None or not self.in_dram:
            return
        saved, self._saved = self._saved, []
        # Wait for all saves before raising, so that none reads from this memory afterwards.
        Transfer.of(saved).wait()
        self._fetched.wait()
        self._rest()

    def keep(self, start: int, stop: int) -> None:
        """Keep bytes `start` to `stop` in DRAM permanently, filled with zeros; the rest of the region stays at rest."""
        if self._store is not None and start < stop:
            self._to_dram(start, stop)
            self._mapping.kept.append((start, stop))

    def read_into(self, memory: Memory, start: int, stop: int, at: int = 0) -> Transfer:
        """Begin to read bytes `start` to `stop` of the region into `memory`, starting at its byte `at`.

        All three are multiples of `ALIGNMENT_BYTES`.
        """
        store = self._open_store()
        if store is None or self.in_dram:
            self._fetched.wait()
            memory.view(at, at + stop - start)[:] = self.view(start, stop)
            return Transfer()
        return store.read(self._extent, memory.view(at, at + stop - start), start)

    def write_from(self, memory: Memory, start: int, stop: int, at: int = 0) -> Transfer:
        """Begin to write bytes `start` to `stop` of the region from `memory`, starting at its byte `at`.

        All three are multiples of `ALIGNMENT_BYTES`. The file is written, and the region's DRAM too if it is in DRAM.
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
        # Tensors that view the memory keep the bytes object and so the mapping alive, even without the region.
        self._bytes.mapping = self._mapping
        # Mapped at once, not first to DRAM, whose limits would then apply.
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
    """The state of a region's memory, for code that only has tensors which view it.

    Attributes:
        kept: The ranges that stay in DRAM while the rest maps the file, as first byte and byte after the last.
        maps: Whether the memory maps the file.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self._address, self._nbytes = address, nbytes
        self.kept: list[tuple[int, int]] = []
        self.maps = False

    def holds(self, tensor: Tensor) -> bool:
        """Return whether `tensor` views this memory and the memory maps the file."""
        return self.maps and self._address <= tensor.data_ptr() < self._address + self._nbytes

    def rest(self, tensor: Tensor) -> None:
        """Let the system reclaim the pages that reads and writes of `tensor` have brought into memory."""
        start = tensor.data_ptr() - self._address
        # Only full pages, since other tensors may use the rest of a page.
        first, last = aligned(start), (start + tensor.nbytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if first < last and not any(begin < last and first < end for begin, end in self.kept):
            _advise(self._address + first, last - first, mmap.MADV_DONTNEED)


@functools.cache
def _bytes_type(nbytes: int) -> Any:
    """Return a ctypes array type of `nbytes` bytes whose instances support weak references."""
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
    """Pin the memory for CUDA copies until `owner` is freed."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
    device, process = torch.cuda.current_device(), os.getpid()
    weakref.finalize(owner, _unpin, address, device, process).atexit = False


def _unpin(address: int, device: int, process: int) -> None:
    # A forked process has the memory, but not its registration with CUDA.
    if os.getpid() != process:
        return
    try:
        # Copies that nothing waits for may still be running.
        torch.cuda.synchronize(device)
    finally:
        # Even if the device has failed: the address will soon belong to other memory.
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        cudart.cudaHostUnregister(address)
