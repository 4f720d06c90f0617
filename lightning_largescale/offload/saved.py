"""Storages that autograd saves, on their way to another tier and back.

To a disk: requests past the page cache want aligned memory, which tensors have not. So a few threads copy a storage, a
piece of a request's size at a time, into a buffer that each of them has, and write that: memory that stays warm takes a
copy at several times a disk's rate, and nothing of a storage's size is needed twice. Back from there a storage is read
into a buffer of its size, which the tensors that come out of it view; a CUDA device copies it from there, beside what
computes.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 5.1 and 6.3; torch notes, "CUDA semantics", streams and
    pinned memory.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.room import Buffers, Extents
from lightning_largescale.offload.store import Extent, Store, StoreError, Transfer, request_threads
from lightning_largescale.tiers import REQUEST_BYTES, aligned


class Saved:
    """A storage that autograd saves, of which tensors are views.

    Attributes:
        name: of the block that saves it.
        nbytes: its size.
        version: of the tensor that was saved first, when it was.
        content: its bytes on the device; None while they are elsewhere only.
        wanted: its backward has come, so it does not leave any more.
        sent: it is away, or on its way.
        used: it came back, and something was computed with it.
        left: how many pieces of it are to be written still.
        error: why it could not leave or come back.
        place: where it is in the other tier.
        coming: on its way back, or back.
        lock: for what changes these, other than the last reference.
    """

    __slots__ = (
        "__weakref__",
        "coming",
        "content",
        "error",
        "left",
        "lock",
        "name",
        "nbytes",
        "place",
        "sent",
        "used",
        "version",
        "wanted",
    )

    def __init__(self, name: str, storage: torch.UntypedStorage, version: int) -> None:
        self.name, self.nbytes, self.version = name, storage.nbytes(), version
        self.content: Tensor | None = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.wanted = self.sent = self.used = False
        self.left = 0
        self.place: Any = None
        self.coming: Any = None
        # In words: an error has its traceback, which may have the graph that has this.
        self.error = ""
        self.lock = threading.Lock()

    def forget(self) -> None:
        """Let what came back, and was used, go once more, as far as the tier still has it."""
        with self.lock:
            if self.used:
                self.coming, self.used = None, False


# What `send` gave: what left, and by what it is known that it has.
Sent = list[tuple["weakref.ref[Saved]", Any]]


class Tier(ABC):
    """Where storages go, and come from."""

    @abstractmethod
    def send(self, storages: Iterable[Saved]) -> Sent:
        """Have them begin to leave: each stays on the device until it has left, or is used again.

        Raises:
            PlanError: the tier has no room for them.
        """

    @abstractmethod
    def settle(self, sent: Sent) -> None:
        """Until they have left.

        Raises:
            StoreError: one of them could not.
        """

    def fetch(self, saved: Saved) -> None:
        """Have it begin to come back, if it is not here; it is not to leave any more."""
        with saved.lock:
            saved.wanted = True
            if saved.content is None and saved.coming is None and not saved.error:
                saved.coming = self._begin(saved)

    def bytes_of(self, saved: Saved) -> Tensor:
        """Its bytes on the device; until they are there.

        Raises:
            StoreError: it could not leave, or come back.
        """
        self.fetch(saved)
        with saved.lock:
            if saved.error:
                raise StoreError(saved.error)
            if saved.content is not None:
                return saved.content
            try:
                found = self._end(saved)
            except StoreError as error:
                # What failed has the error, and the error this graph, in which a garbage collector does not look.
                saved.error, saved.coming = str(error), None
                raise
            saved.used = True
            return found

    @abstractmethod
    def _begin(self, saved: Saved) -> Any:
        """What is known of it while it comes, and after that."""

    @abstractmethod
    def _end(self, saved: Saved) -> Tensor:
        """Its bytes, when they are there; called as often as they are used."""


@dataclass
class _Coming:
    """A storage on its way back from a disk.

    Attributes:
        buffer: in DRAM, into which it is read; None when it has been copied on from there.
        transfer: that reads it.
        target: on a CUDA device, into which it is copied from there.
        event: of the device, before which it may not be copied; once it is, after which it is there.
    """

    buffer: Tensor | None
    transfer: Transfer
    target: Tensor | None = None
    event: Any = None


class DiskTier(Tier):
    """A store.

    Args:
        store: on the disk.
        device: the device tier's.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device = store, device
        self._cuda = device.type == "cuda"
        self._extents = Extents(store)
        self._buffers = Buffers(pinned=self._cuda)
        self._taking = threading.Lock()
        self._own = threading.local()
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        # Copies to the device that are under way: of which block, and out of which buffer.
        self._copying: list[tuple[str, Any, Tensor]] = []
        # The two blocks of which storages began to come back last.
        self._names: tuple[str, ...] = ()
        self._threads = request_threads("activations")
        weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True).atexit = False

    def send(self, storages: Iterable[Saved]) -> Sent:
        """As of every tier."""
        computed = torch.cuda.current_stream(self._device).record_event() if self._cuda else None
        sent: Sent = []
        for saved in storages:
            saved.place = self._extents.take(f"what {saved.name} saves", saved.nbytes, saved)
            starts = range(0, saved.nbytes, REQUEST_BYTES)
            saved.left, saved.sent = len(starts), True
            # The last reference to it is then its graph's: without that nothing is written.
            known = weakref.ref(saved)
            sent += [(known, self._threads.submit(self._write, known, start, computed)) for start in starts]
        return sent

    def settle(self, sent: Sent) -> None:
        """As of every tier."""
        written: Future[None]
        for _, written in sent:
            written.result()
        for known, _ in sent:
            saved = known()
            # Where backward has come to it, backward says so.
            if saved is not None and saved.error and not saved.wanted:
                raise StoreError(saved.error)

    def _write(self, known: weakref.ref[Saved], start: int, computed: Any) -> None:
        saved = known()
        # Used before it was gone: it stays.
        if saved is None or saved.wanted or saved.content is None:
            return
        extent: Extent = saved.place
        stop = min(start + REQUEST_BYTES, saved.nbytes)
        staging: Memory | None = getattr(self._own, "staging", None)
        if staging is None:
            staging = self._own.staging = Memory(REQUEST_BYTES, pinned=self._cuda)
        _copy(staging.tensor(torch.uint8, (stop - start,)), saved.content[start:stop], computed)
        try:
            self._store.write(extent, staging.view(0, aligned(stop - start)), start).wait()
        except StoreError as error:
            saved.error = str(error)
            return
        with saved.lock:
            saved.left -= 1
            if saved.left == 0 and not saved.wanted:
                saved.content = None

    def _begin(self, saved: Saved) -> _Coming:
        self._wait_for_others(saved.name)
        with self._taking:
            buffer, view = self._buffers.take(saved.nbytes)
        transfer = self._store.read(saved.place, view)
        if not self._cuda:
            return _Coming(buffer, transfer)
        # Memory of the stream that computes, which may still compute in it.
        target = torch.empty(buffer.nbytes, dtype=torch.uint8, device=self._device)
        return _Coming(buffer, transfer, target, torch.cuda.current_stream(self._device).record_event())

    def _end(self, saved: Saved) -> Tensor:
        coming: _Coming = saved.coming
        coming.transfer.wait()
        if coming.target is None:
            assert coming.buffer is not None
            return coming.buffer
        if coming.buffer is not None:
            self._stream.wait_event(coming.event)
            with torch.cuda.stream(self._stream):
                coming.target.copy_(coming.buffer, non_blocking=True)
                # It may be let go before the copy is over.
                coming.target.record_stream(self._stream)
                coming.event = self._stream.record_event()
            with self._taking:
                self._copying.append((saved.name, coming.event, coming.buffer))
            coming.buffer = None
        torch.cuda.current_stream(self._device).wait_event(coming.event)
        return coming.target

    def _wait_for_others(self, name: str) -> None:
        """Until buffers are in use for the block `name` and the one before it alone, as plans count them: the host may
        be any number of blocks ahead of the device.
        """
        with self._taking:
            if name not in self._names:
                self._names = (*self._names[-1:], name)
            for block, event, _ in self._copying:
                if block not in self._names:
                    event.synchronize()
            # A buffer comes back only when its copy is over.
            self._copying = [one for one in self._copying if not one[1].query()]


class HostTier(Tier):
    """Pinned DRAM, for a CUDA device: copies run on a stream of their own, and no step of the host waits for one.

    A storage that left is let go only after the stream that computes was told to wait for its copy: whatever that
    computes next in the same memory comes after it. One that goes before, used or not, leaves its memory to others when
    its copy is over.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = Buffers(pinned=True)
        self._taking = threading.Lock()

    def send(self, storages: Iterable[Saved]) -> Sent:
        """As of every tier."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        sent: Sent = []
        with torch.cuda.stream(self._stream):
            for saved in storages:
                assert saved.content is not None
                with self._taking:
                    saved.place, _ = self._buffers.take(saved.nbytes)
                saved.place[: saved.nbytes].copy_(saved.content, non_blocking=True)
                saved.sent = True
                # Told of the copy at once, the allocator would keep what leaves in time for longer as well.
                early = weakref.finalize(saved, saved.content.record_stream, self._stream)
                early.atexit = False
                sent.append((weakref.ref(saved), (self._stream.record_event(), early)))
        return sent

    def settle(self, sent: Sent) -> None:
        """As of every tier."""
        for known, (copied, early) in sent:
            saved = known()
            if saved is None:
                continue
            torch.cuda.current_stream(self._device).wait_event(copied)
            early.detach()
            with saved.lock:
                if not saved.wanted:
                    saved.content = None

    def _begin(self, saved: Saved) -> tuple[Tensor, Any]:
        # Memory of the stream that computes, which may still compute in it.
        found = torch.empty(saved.nbytes, dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            found.copy_(saved.place[: saved.nbytes], non_blocking=True)
            # It may be let go before anything waited for it.
            found.record_stream(self._stream)
            return found, self._stream.record_event()

    def _end(self, saved: Saved) -> Tensor:
        found: Tensor
        found, copied = saved.coming
        torch.cuda.current_stream(self._device).wait_event(copied)
        return found


def _copy(target: Tensor, source: Tensor, computed: Any) -> None:
    """Copy bytes into DRAM; from a CUDA device once the event `computed` is over."""
    if computed is None:
        # Tensor.copy_ would start threads of its own, beside those that compute; the GIL is not held.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        return
    with torch.cuda.device(source.device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_event(computed)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()
