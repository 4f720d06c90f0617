"""Transfer of the storages that autograd saves to another tier and back.

To a disk: O_DIRECT requires aligned memory, and tensors are not aligned. So a few threads copy a storage, in chunks of
a request's size, into a staging buffer of each thread, and write the buffer. A copy into a small buffer that is reused
runs at several times a disk's rate, and no second buffer of the storage's size is needed. From a disk, a storage is
read into a buffer of its size, which the unpacked tensors view. For a CUDA device, the buffer is copied to the device,
overlapping with computation.

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
    """A storage that autograd saves, which saved tensors view.

    Attributes:
        name: The name of the block that saves it.
        nbytes: Its size in bytes.
        version: The version of the first tensor that was saved, at the time of saving.
        content: Its bytes on the device; None while they are only in the other tier.
        wanted: Whether its backward has begun, so that it is not offloaded any more.
        sent: Whether its offload has begun.
        used: Whether it was fetched and used.
        left: The number of chunks of it that are not written yet.
        error: The reason why it could not be offloaded or fetched; empty if there is none.
        place: Its location in the other tier.
        coming: The fetch, pending or complete; None if there is none.
        lock: Lock for changes of these attributes. Dropping the last reference takes no lock.
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
        """Create the record of a storage that was saved just now.

        Args:
            name: The name of the block that saves it.
            storage: The storage.
            version: The version of the tensor that was saved.
        """
        self.name, self.nbytes, self.version = name, storage.nbytes(), version
        self.content: Tensor | None = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.wanted = self.sent = self.used = False
        self.left = 0
        self.place: Any = None
        self.coming: Any = None
        # A string: an exception holds its traceback, which may hold the graph that holds this object.
        self.error = ""
        self.lock = threading.Lock()

    def forget(self) -> None:
        """Free the fetched bytes if they were used; the other tier still holds them."""
        with self.lock:
            if self.used:
                self.coming, self.used = None, False


# The result of `send`: each storage, and the object that tells when its offload is complete.
Sent = list[tuple["weakref.ref[Saved]", Any]]


class Tier(ABC):
    """A tier that storages are offloaded to and fetched from."""

    @abstractmethod
    def send(self, storages: Iterable[Saved]) -> Sent:
        """Begin to offload `storages`. Each stays on the device until its offload is complete.

        A storage that is used before that stays on the device.

        Raises:
            PlanError: The tier has no room for them.
        """

    @abstractmethod
    def settle(self, sent: Sent) -> None:
        """Wait until the storages are offloaded.

        Raises:
            StoreError: A storage could not be offloaded.
        """

    def fetch(self, saved: Saved) -> None:
        """Begin to fetch `saved`, if it is not on the device; from now on it is not offloaded any more."""
        with saved.lock:
            saved.wanted = True
            if saved.content is None and saved.coming is None and not saved.error:
                saved.coming = self._begin(saved)

    def bytes_of(self, saved: Saved) -> Tensor:
        """Return the bytes of `saved` on the device, waiting for them if necessary.

        Raises:
            StoreError: The storage could not be offloaded or fetched.
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
                # The failed transfer holds the error and, through its traceback, this graph. The garbage collector does
                # not look into graphs, so this cycle would never be freed.
                saved.error, saved.coming = str(error), None
                raise
            saved.used = True
            return found

    @abstractmethod
    def _begin(self, saved: Saved) -> Any:
        """Begin the fetch, and return the object that represents it, while it is pending and afterwards."""

    @abstractmethod
    def _end(self, saved: Saved) -> Tensor:
        """Wait for the fetch, and return the bytes. Called every time they are used."""


@dataclass
class _Coming:
    """The fetch of a storage from a disk.

    Attributes:
        buffer: The buffer in DRAM that it is read into; None once its copy to the device has begun.
        transfer: The transfer that reads it.
        target: The tensor on a CUDA device that the buffer is copied to; None on a CPU.
        event: A CUDA event. Before the copy is enqueued, it is the event that the copy must wait for; then, the event
            that marks the end of the copy.
    """

    buffer: Tensor | None
    transfer: Transfer
    target: Tensor | None = None
    event: Any = None


class DiskTier(Tier):
    """The nvme tier: a store on a disk.

    Args:
        store: The store.
        device: The device that storages come from.
        ahead: The number of blocks that are fetched before the one whose backward runs.
    """

    def __init__(self, store: Store, device: torch.device, ahead: int) -> None:
        self._store, self._device, self._ahead = store, device, ahead
        self._cuda = device.type == "cuda"
        self._extents = Extents(store)
        self._buffers = Buffers(pinned=self._cuda)
        self._taking = threading.Lock()
        self._own = threading.local()
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        # Pending copies to the device: the block's name, the event that marks the end, and the source buffer.
        self._copying: list[tuple[str, Any, Tensor]] = []
        # The blocks whose storages were fetched last: the one whose backward runs, and those ahead.
        self._names: tuple[str, ...] = ()
        self._threads = request_threads("activations")
        weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True).atexit = False

    def send(self, storages: Iterable[Saved]) -> Sent:
        """Begin to copy `storages` to the store, in chunks, on the threads."""
        computed = torch.cuda.current_stream(self._device).record_event() if self._cuda else None
        sent: Sent = []
        for saved in storages:
            saved.place = self._extents.take(f"what {saved.name} saves", saved.nbytes, saved)
            starts = range(0, saved.nbytes, REQUEST_BYTES)
            saved.left, saved.sent = len(starts), True
            # A weak reference, so that the graph holds the only strong one: once the graph is gone, nothing is written.
            known = weakref.ref(saved)
            sent += [(known, self._threads.submit(self._write, known, start, computed)) for start in starts]
        return sent

    def settle(self, sent: Sent) -> None:
        """Wait until the chunks are written, and raise the error of a failed write."""
        written: Future[None]
        for _, written in sent:
            written.result()
        for known, _ in sent:
            saved = known()
            # If backward needs it already, backward raises the error.
            if saved is not None and saved.error and not saved.wanted:
                raise StoreError(saved.error)

    def _write(self, known: weakref.ref[Saved], start: int, computed: Any) -> None:
        saved = known()
        # A storage that is used before its offload is complete stays on the device.
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
        # The memory belongs to the computing stream, which may still use its previous contents.
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
                # The target may be freed before the copy ends.
                coming.target.record_stream(self._stream)
                coming.event = self._stream.record_event()
            with self._taking:
                self._copying.append((saved.name, coming.event, coming.buffer))
            coming.buffer = None
        torch.cuda.current_stream(self._device).wait_event(coming.event)
        return coming.target

    def _wait_for_others(self, name: str) -> None:
        """Wait until buffers are in use only for the block `name` and the `ahead` fetched before it, as plans assume.

        The host may run any number of blocks ahead of the device.
        """
        with self._taking:
            if name not in self._names:
                self._names = (*self._names[-self._ahead :], name)
            for block, event, _ in self._copying:
                if block not in self._names:
                    event.synchronize()
            # A buffer is returned only after its copy has ended.
            self._copying = [one for one in self._copying if not one[1].query()]


class HostTier(Tier):
    """The cpu tier for a CUDA device: pinned DRAM. Copies run on a stream of their own, and the host waits for none.

    An offloaded storage is freed only after the computing stream was made to wait for its copy, so that later work in
    the same memory runs after the copy. If the storage is freed before that, used or not, the allocator reuses its
    memory only after the copy has ended.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = Buffers(pinned=True)
        self._taking = threading.Lock()

    def send(self, storages: Iterable[Saved]) -> Sent:
        """Begin to copy `storages` to pinned DRAM, on the copy stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        sent: Sent = []
        with torch.cuda.stream(self._stream):
            for saved in storages:
                assert saved.content is not None
                with self._taking:
                    saved.place, _ = self._buffers.take(saved.nbytes)
                saved.place[: saved.nbytes].copy_(saved.content, non_blocking=True)
                saved.sent = True
                # Only storages that are freed early are recorded on the copy's stream. Recording all of them now would
                # make the allocator hold the memory of the others longer too.
                early = weakref.finalize(saved, saved.content.record_stream, self._stream)
                early.atexit = False
                sent.append((weakref.ref(saved), (self._stream.record_event(), early)))
        return sent

    def settle(self, sent: Sent) -> None:
        """Make the computing stream wait for the copies, and free the storages on the device."""
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
        # The memory belongs to the computing stream, which may still use its previous contents.
        found = torch.empty(saved.nbytes, dtype=torch.uint8, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            found.copy_(saved.place[: saved.nbytes], non_blocking=True)
            # The tensor may be freed before any stream waits for the copy.
            found.record_stream(self._stream)
            return found, self._stream.record_event()

    def _end(self, saved: Saved) -> Tensor:
        found: Tensor
        found, copied = saved.coming
        torch.cuda.current_stream(self._device).wait_event(copied)
        return found


def _copy(target: Tensor, source: Tensor, computed: Any) -> None:
    """Copy bytes into DRAM. From a CUDA device, wait for the event `computed` first, then for the copy."""
    if computed is None:
        # Tensor.copy_ would start threads that compete with those that compute. memmove does not hold the GIL.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        return
    with torch.cuda.device(source.device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_event(computed)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()
