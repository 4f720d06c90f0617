"""Resources that return to their pool when their holder is freed: buffers in DRAM, and extents of a store's file.

A finalizer of the holder returns the resource. It may run on any thread, in the middle of any other code. So finalizers
take no lock; they only use operations that are atomic in Python.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 6.3 (pinned memory management layer).
"""

from __future__ import annotations

import weakref
from collections import deque

from torch import Tensor

from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.store import Extent, Store
from lightning_largescale.tiers import ALIGNMENT_BYTES, aligned


class Buffers:
    """A pool of buffers of any size. A returned buffer is reused for requests of its size, which recur in a model.

    Copies into memory that was used before run at ten times the rate of copies into newly allocated memory, so returned
    buffers are kept. The pool keeps no more than were in use at once, and nothing once all buffers are returned.

    Args:
        pinned: Whether to pin the buffers for CUDA copies. Pinned buffers stay in the pool even when all are returned,
            since pinning is slow.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Memory]] = {}
        self._lent: dict[int, Memory] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers, in use or not."""
        free = [memory for memories in list(self._free.values()) for memory in list(memories)]
        return sum(memory.nbytes for memory in (*free, *list(self._lent.values())))

    def take(self, nbytes: int) -> tuple[Tensor, memoryview]:
        """Take a buffer of at least `nbytes`. Call this from one thread at a time.

        Returns:
            The buffer as a tensor of bytes, and as a memoryview for requests. It returns to the pool once neither is
            referenced any more.
        """
        size = aligned(nbytes)
        try:
            memory = self._free[size].pop()
        except (KeyError, IndexError):
            self._drop(size)
            memory = Memory(size, pinned=self._pinned)
        self._lent[id(memory)] = memory
        return memory.lend(self._take_back)

    def _drop(self, nbytes: int) -> None:
        """Release free buffers of `nbytes` in total or more, as far as there are any."""
        for memories in self._free.values():
            while memories and nbytes > 0:
                nbytes -= memories.pop().nbytes

    def _take_back(self, memory: Memory) -> None:
        del self._lent[id(memory)]
        if self._lent or self._pinned:
            self._free.setdefault(memory.nbytes, []).append(memory)
        else:
            self._free.clear()


class Extents:
    """Extents of a store's file. Returned extents are reused before the file grows.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Offset and size of each free extent, in order of offset; adjacent ones are merged.
        self._free: list[tuple[int, int]] = []
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, name: str, nbytes: int, holder: object) -> Extent:
        """Take an extent, which is returned when `holder` is freed. Call this from one thread at a time.

        Args:
            name: The name of the contents, for messages.
            nbytes: The number of bytes; rounded up to a multiple of `ALIGNMENT_BYTES`.
            holder: The object that holds the extent; only a weak reference to it is kept.

        Raises:
            PlanError: The disk has too little free space.
        """
        nbytes = max(ALIGNMENT_BYTES, aligned(nbytes))
        while self._returned:
            self._merge(*self._returned.popleft())
        fitting = [(size, offset) for offset, size in self._free if size >= nbytes]
        if fitting:
            size, offset = min(fitting)
            self._free.remove((offset, size))
            if size > nbytes:
                self._merge(offset + nbytes, size - nbytes)
            extent = Extent(name, offset, nbytes)
        else:
            extent = self._store.reserve(name, nbytes)
        weakref.finalize(holder, self._returned.append, (extent.offset, extent.nbytes)).atexit = False
        return extent

    def _merge(self, offset: int, nbytes: int) -> None:
        """Add an extent to the free ones, merged with those that are adjacent to it."""
        touching = [(at, size) for at, size in self._free if at + size == offset or offset + nbytes == at]
        for at, size in touching:
            self._free.remove((at, size))
        start = min([offset, *(at for at, _ in touching)])
        self._free.append((start, nbytes + sum(size for _, size in touching)))
        self._free.sort()
