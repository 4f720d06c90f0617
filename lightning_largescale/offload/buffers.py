"""The memory that pages pass through, and that which is left for what need not move."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from lightning_largescale.offload.memory import Memory
from lightning_largescale.offload.store import Transfer
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


class Buffers:
    """At most `PAGE_BUFFERS` pieces of memory, each as large as the largest page, made when they are first needed.

    Args:
        pinned: whether CUDA copies to and from them directly.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned, self._nbytes, self._count = pinned, 0, 0
        self._free: list[Memory] = []

    def make_room(self, nbytes: int) -> None:
        """Let each hold `nbytes`; not while any is taken."""
        if nbytes > self._nbytes:
            self._nbytes, self._count = nbytes, 0
            self._free.clear()

    def take(self, leaving: deque[tuple[Memory, Transfer]]) -> Memory:
        """One that is free; if there is none, the first of those on their way out, once it is through.

        Raises:
            StoreError: its transfer failed.
        """
        if self._free:
            return self._free.pop()
        if self._count < PAGE_BUFFERS:
            self._count += 1
            return Memory(self._nbytes, pinned=self._pinned)
        memory, transfer = leaving[0]
        transfer.wait()
        leaving.popleft()
        return memory

    def give_back(self, taken: Iterable[tuple[Memory, Transfer]]) -> None:
        """Take back what was taken, once it is through.

        Raises:
            StoreError: a transfer failed.
        """
        failed: Exception | None = None
        for memory, transfer in taken:
            try:
                transfer.wait()
            except RuntimeError as error:
                failed = failed or error
            self._free.append(memory)
        if failed is not None:
            raise failed
