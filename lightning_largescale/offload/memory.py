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
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.offload.store import Store, Transfer
from lightning_largescale.tiers import aligned

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
        self._to_dram()
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
        """Its bytes, for requests."""
        return memoryview(self._bytes).cast("B")[start : self.nbytes if stop is None else stop]

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

    def _to_dram(self) -> None:
        _map(self._address, self.nbytes, _READ_WRITE, _FIXED | _PRIVATE | _ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Without huge pages it is slower, and that is all.
            _libc().madvise(ctypes.c_void_p(self._address), ctypes.c_size_t(self.nbytes), mmap.MADV_HUGEPAGE)


class Region(Memory):
    """Memory that is in DRAM, or at rest in a file of a store; it begins at rest, as zeros.

    Args:
        store: on the disk; None for what never leaves DRAM, of which the methods below have nothing to do.
        name: of what is kept in it, for messages.
        nbytes: its size.

    Attributes:
        in_dram: whether it is.

    Raises:
        PlanError: the disk has not as many bytes.
    """

    def __init__(self, store: Store | None, name: str, nbytes: int) -> None:
        super().__init__(nbytes)
        self._store, self.in_dram = store, True
        if store is not None:
            self._extent = store.reserve(name, nbytes)
            self.drop()

    def fetch(self) -> Transfer:
        """Begin to bring it into DRAM; its values are there when the transfer is over."""
        if self.in_dram or self._store is None:
            return Transfer()
        self.claim()
        return self._store.read(self._extent, self.view())

    def claim(self) -> None:
        """Have it in DRAM at once, with no values."""
        if not self.in_dram:
            self._to_dram()
            self.in_dram = True

    def save(self, start: int = 0, stop: int | None = None) -> Transfer:
        """Begin to write what is in DRAM to the file, from byte `start` to `stop`, each rounded to what O_DIRECT
        takes; it stays in DRAM.
        """
        if self._store is None or not self.in_dram:
            return Transfer()
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = self.nbytes if stop is None else min(self.nbytes, aligned(stop))
        return self._store.write(self._extent, self.view(first, last), first)

    def drop(self) -> None:
        """Let the file alone have it: what is in DRAM and was not saved is lost."""
        if self._store is None:
            return
        _map(
            self._address,
            self.nbytes,
            _READ_WRITE,
            _FIXED | _SHARED,
            self._store.descriptor,
            self._extent.offset,
        )
        self.in_dram = False

    def read_into(self, memory: Memory, start: int, stop: int, at: int = 0) -> Transfer:
        """Begin to read bytes `start` to `stop` of the file into `memory` from its byte `at` on."""
        if self._store is None or self.in_dram:
            memory.view(at, at + stop - start)[:] = self.view(start, stop)
            return Transfer()
        return self._store.read(self._extent, memory.view(at, at + stop - start), start)

    def write_from(self, memory: Memory, start: int, stop: int, at: int = 0) -> Transfer:
        """Begin to write bytes `start` to `stop` of the file from `memory`, from its byte `at` on."""
        if self._store is None or self.in_dram:
            self.view(start, stop)[:] = memory.view(at, at + stop - start)
            if self._store is None:
                return Transfer()
        return self._store.write(self._extent, memory.view(at, at + stop - start), start)


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
        raise OSError(number, f"mapping {nbytes} bytes failed")
    return int(found)


def _unmap(address: int, nbytes: int) -> None:
    _libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))


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
    weakref.finalize(owner, cudart.cudaHostUnregister, address).atexit = False
