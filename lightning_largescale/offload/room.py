"""Room that is handed out and comes back by itself: buffers in DRAM, and stretches of a store's file.

What has room gives it back by being no more, on whatever thread that happens and in the middle of whatever else is done
there. So what is called then takes no lock; it does what Python does in one piece.

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
    """Buffers of any size. One that came back is kept for the next of its size, as what repeats in a model asks for.

    Memory that was used before is copied to at ten times the rate of what the system has yet to find. So no more is
    kept than was in use at once, and nothing once all are back.

    Args:
        pinned: whether CUDA copies to and from them; then they are kept, since to pin takes long.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Memory]] = {}
        self._lent: dict[int, Memory] = {}

    @property
    def nbytes(self) -> int:
        """Of all that there are, in use or not."""
        free = [memory for memories in list(self._free.values()) for memory in list(memories)]
        return sum(memory.nbytes for memory in (*free, *list(self._lent.values())))

    def take(self, nbytes: int) -> tuple[Tensor, memoryview]:
        """A buffer as a tensor of bytes, `nbytes` of them or a few more, and for requests; without either it comes
        back. For one thread at a time.
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
        """Let others that are free go, as many bytes at least."""
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
    """Stretches of a store's file: those that came back are handed out again, before the file grows."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # By where they begin; none touches the next.
        self._free: list[tuple[int, int]] = []
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, name: str, nbytes: int, holder: object) -> Extent:
        """A stretch of `nbytes`, rounded up, which comes back when `holder` is no more. For one thread at a time.

        Args:
            name: of what is to be kept there, for messages.
            nbytes: as many as are needed.
            holder: of which a weak reference is kept.

        Raises:
            PlanError: the disk has not as many.
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
        """Add a stretch to those that are free, as one with those that it touches."""
        touching = [(at, size) for at, size in self._free if at + size == offset or offset + nbytes == at]
        for at, size in touching:
            self._free.remove((at, size))
        start = min([offset, *(at for at, _ in touching)])
        self._free.append((start, nbytes + sum(size for _, size in touching)))
        self._free.sort()
