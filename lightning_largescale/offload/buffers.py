"""Buffers that pages go through, and budgets of memory for state that is not moved."""

from __future__ import annotations

from collections import deque

from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.store import StoreError, Transfer
from lightning_largescale.tiers import PAGE_BUFFERS


class Allowance:
    """A budget of bytes.

    Args:
        nbytes: The initial budget.
    """

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes

    def take(self, nbytes: int) -> bool:
        """Take `nbytes` if that many are left, and return whether they were."""
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Return `nbytes` to the budget."""
        self._left += nbytes


class PageBuffers:
    """A pool of buffers, each as large as the largest page, allocated when they are first needed.

    Args:
        pinned: Whether to pin the buffers for CUDA copies.
        most: The maximum number of buffers.
    """

    def __init__(self, *, pinned: bool = False, most: int = PAGE_BUFFERS) -> None:
        self._pinned, self._most, self._nbytes, self._count = pinned, most, 0, 0
        self._free: list[Memory] = []
        self._leaving = deque[tuple[Memory, Transfer]]()

    def make_room(self, nbytes: int) -> None:
        """Make each buffer hold at least `nbytes`. Do not call this while a buffer is taken."""
        if nbytes > self._nbytes:
            self.drain()
            self._nbytes, self._count = nbytes, 0
            self._free.clear()

    def take(self) -> Memory:
        """Take a free buffer. If none is free, wait for the transfer of the one that was given back first.

        Raises:
            StoreError: That transfer failed.
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
        """Give a buffer back; it may be taken again once `transfer` has ended."""
        self._leaving.append((memory, transfer))

    def drain(self) -> None:
        """Wait for the transfers of all buffers that were given back.

        Raises:
            StoreError: A transfer failed.
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
