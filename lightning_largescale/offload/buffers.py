"""The memory that pages pass through, and that which is left for what need not move."""

from __future__ import annotations

from collections import deque

from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.store import StoreError, Transfer
from lightning_largescale.tiers import PAGE_BUFFERS


class Allowance:
    """Bytes of which what is taken is taken off.

    Args:
        nbytes: there at first.
    """

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes

    def take(self, nbytes: int) -> bool:
        """Whether there are as many left, which then are taken."""
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Let others take what was taken."""
        self._left += nbytes


class PageBuffers:
    """A few pieces of memory, each as large as the largest page, made when they are first needed.

    Args:
        pinned: whether CUDA copies to and from them directly.
        most: how many there are at most.
    """

    def __init__(self, *, pinned: bool = False, most: int = PAGE_BUFFERS) -> None:
        self._pinned, self._most, self._nbytes, self._count = pinned, most, 0, 0
        self._free: list[Memory] = []
        self._leaving = deque[tuple[Memory, Transfer]]()

    def make_room(self, nbytes: int) -> None:
        """Let each hold `nbytes`; not while any is taken."""
        if nbytes > self._nbytes:
            self.drain()
            self._nbytes, self._count = nbytes, 0
            self._free.clear()

    def take(self) -> Memory:
        """One that is free; if there is none, the first of those on their way out, once it is through.

        Raises:
            StoreError: its transfer failed.
        """
        if self._free:
            return self._free.pop()
        if self._count < self._most:
            self._count += 1
            return Memory(self._nbytes, pinned=self._pinned)
        memory, transfer = self._leaving[0]
        transfer.wait()
        self._leaving.popleft()
        return memory

    def give_back(self, memory: Memory, transfer: Transfer) -> None:
        """Let others take what was taken, once `transfer` is through."""
        self._leaving.append((memory, transfer))

    def drain(self) -> None:
        """Until all that was given back is through.

        Raises:
            StoreError: a transfer failed.
        """
        failed: StoreError | None = None
        while self._leaving:
            memory, transfer = self._leaving.popleft()
            try:
                transfer.wait()
            except StoreError as error:
                failed = failed or error
            self._free.append(memory)
        if failed is not None:
            raise failed
