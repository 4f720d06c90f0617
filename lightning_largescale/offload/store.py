"""Tensors in files, through aligned requests that bypass the page cache; reads and writes run concurrently.

Threads that call preadv and pwritev reach the disk's own rate; the GIL is not held during a request. Each process has a
folder of its own below `nvme_path`. A lock marks it as in use while the process lives, so that a later start can detect
and remove the folders of dead processes.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 6.3 (DeepNVMe); man pages open(2), O_DIRECT, and flock(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lightning_largescale.errors import PlanError
from lightning_largescale.offload.direct import REFUSALS, DirectFile
from lightning_largescale.offload.folder import FILE, checked, own_folder, remove
from lightning_largescale.offload.folder import remove_stale as remove_stale
from lightning_largescale.tiers import ALIGNMENT_BYTES, REQUEST_BYTES, REQUESTS, aligned
from lightning_largescale.units import format_bytes

_VERIFY = "LARGESCALE_STORE_VERIFY"


class StoreError(RuntimeError):
    """Failure to read or write a file of the store; the message names the file, the tensors and the offset."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes in the store's file.

    Attributes:
        name: The name of its contents.
        offset: The offset of its first byte, a multiple of `ALIGNMENT_BYTES`.
        nbytes: Its length in bytes, a multiple of `ALIGNMENT_BYTES`.
    """

    name: str
    offset: int
    nbytes: int


class Request(Protocol):
    """Interface of a pending request, a subset of `Future`."""

    def done(self) -> bool:
        """Return whether the request has ended."""

    def exception(self) -> BaseException | None:
        """Wait for the end of the request, and return the exception that it failed with, or None."""


class Transfer:
    """A group of pending requests."""

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        self._requests = requests
        self._process = os.getpid()
        self._on_failure: list[Callable[[], None]] = []

    @classmethod
    def of(cls, transfers: Sequence[Transfer]) -> Transfer:
        """Return one transfer of all requests of `transfers`."""
        whole = cls([request for transfer in transfers for request in transfer._requests])
        whole._on_failure = [call for transfer in transfers for call in transfer._on_failure]
        return whole

    def wait(self) -> None:
        """Wait until all requests have ended. May be called repeatedly, and from several threads.

        Raises:
            StoreError: A request failed, or the store was closed before it began.
        """
        if not self.over and self._process != os.getpid():
            raise StoreError("this transfer was begun before a fork, so this process has no thread that ends it.")
        # Wait for all requests before raising, so that none of them accesses its memory afterwards.
        failures = [error for error in map(_failure, self._requests) if error is not None]
        if failures:
            calls, self._on_failure = self._on_failure, []
            for call in calls:
                call()
            raise failures[0]
        self._requests, self._on_failure = (), []

    @property
    def over(self) -> bool:
        """Return whether all requests have ended and none failed."""
        return all(request.done() and _failure(request) is None for request in self._requests)

    def on_failure(self, call: Callable[[], None]) -> None:
        """Register a function that `wait` calls once before it raises."""
        self._on_failure.append(call)


def _failure(request: Request) -> BaseException | None:
    try:
        return request.exception()
    except CancelledError:
        return StoreError("the store was closed before this transfer was over.")


class Store:
    """A file of tensors in a folder of this process's own, which is removed with the store.

    Requests on the same bytes run in any order: wait for one before the next begins. A forked process may use its copy
    of the store; the copy has threads of its own and shares the file.

    Args:
        folder: The folder of the nvme tier. The folders of dead processes in it are removed.
        verify: Whether to keep checksums of written bytes and compare them on reads; None to do so if the environment
            variable LARGESCALE_STORE_VERIFY is "1". Writes through a mapping of the file do not update the checksums,
            and count as errors.
        file: The class of the file that the requests go to.

    Attributes:
        path: The process's own folder.
        read_bytes: The bytes read so far.
        written_bytes: The bytes written so far.

    Raises:
        PlanError: The folder does not exist or is not writable.
    """

    def __init__(self, folder: str | Path, *, verify: bool | None = None, file: type[DirectFile] = DirectFile) -> None:
        folder = Path(folder)
        with checked(folder), contextlib.ExitStack() as undo:
            remove_stale(folder)
            self.path, lock = own_folder(folder)
            undo.callback(remove, self.path, lock)
            self._file = file(self.path / FILE)
            undo.pop_all()
        self._end = 0
        self._lock = threading.Lock()
        self._checksums: _Checksums | None = None
        if os.environ.get(_VERIFY) == "1" if verify is None else verify:
            self._checksums = _Checksums()
        self._threads = _Threads()
        self.read_bytes, self.written_bytes = 0, 0
        self._finalizer = weakref.finalize(self, _end, self.path, self._file, self._threads, lock, os.getpid())

    @property
    def descriptor(self) -> int:
        """The file's descriptor, for mapping it."""
        return self._file.descriptor

    @property
    def closed(self) -> bool:
        """Return whether the store is closed. It then takes no requests, and `descriptor` is invalid."""
        return not self._finalizer.alive

    def reserve(self, name: str, nbytes: int) -> Extent:
        """Reserve space on the disk, so that no write can fail because the disk is full.

        Args:
            name: The name of the contents, for messages.
            nbytes: The number of bytes; rounded up to a multiple of `ALIGNMENT_BYTES`.

        Raises:
            PlanError: The disk has too little free space.
            StoreError: The reservation failed for another reason, or the store is closed.
        """
        nbytes = max(ALIGNMENT_BYTES, aligned(nbytes))
        with self._lock:
            self._check_open(name)
            extent = Extent(name, self._end, nbytes)
            try:
                self._file.reserve(extent.offset, nbytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise self._error("setting aside", extent, 0, nbytes, error) from error
                before = f", beside {format_bytes(self._end, up=True)} for what came before" if self._end else ""
                raise PlanError(
                    f"{format_bytes(nbytes, up=True)} are needed on {str(self.path.parent)!r} for {name}{before}, and"
                    f" there are {format_bytes(self._file.free_bytes())} ({error.strerror}); free some, or give another"
                    " folder as nvme_path."
                ) from error
            # Mappings must begin at a memory page, and memory pages may be larger than the alignment for O_DIRECT.
            self._end += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return extent

    def read(self, extent: Extent, memory: memoryview, start: int = 0) -> Transfer:
        """Begin to read into `memory`.

        Args:
            extent: The extent to read from.
            memory: The bytes to read into; address and length are multiples of `ALIGNMENT_BYTES`. Do not access them
                until the transfer has ended.
            start: The first byte in the extent, a multiple of `ALIGNMENT_BYTES` too.
        """
        transfer = self._begin(self._read, extent, memory, start)
        with self._lock:
            self.read_bytes += len(memory)
        return transfer

    def write(self, extent: Extent, memory: memoryview, start: int = 0) -> Transfer:
        """Begin to write `memory`; the arguments are as for `read`."""
        transfer = self._begin(self._write, extent, memory, start)
        with self._lock:
            self.written_bytes += len(memory)
        return transfer

    def close(self) -> None:
        """Wait for running requests, cancel the others, and remove the folder. Mappings of the file stay valid."""
        self._threads.end(wait=True)
        self._finalizer()

    def _begin(
        self, request: Callable[[Extent, int, memoryview], None], extent: Extent, memory: memoryview, start: int
    ) -> Transfer:
        self._check_open(extent.name)
        _check_request(extent, memory, start)
        parts = range(0, len(memory), REQUEST_BYTES)
        return Transfer(
            [self._threads.submit(request, extent, start + part, memory[part : part + REQUEST_BYTES]) for part in parts]
        )

    def _check_open(self, name: str) -> None:
        if self.closed:
            raise StoreError(f"{str(self.path)!r} is closed, and {name} was asked for.")

    def _read(self, extent: Extent, start: int, memory: memoryview) -> None:
        self._move("reading", self._file.read_at, extent, start, memory)
        if self._checksums is not None:
            wrong = self._checksums.wrong(extent.offset + start, memory)
            if wrong is not None:
                why = "these are not the bytes that were written, unless they were changed in place while at rest"
                raise self._error("reading", extent, start + wrong, ALIGNMENT_BYTES, why)

    def _write(self, extent: Extent, start: int, memory: memoryview) -> None:
        if self._checksums is not None:
            self._checksums.note(extent.offset + start, memory)
        self._move("writing", self._file.write_at, extent, start, memory)

    def _move(
        self, doing: str, move: Callable[[memoryview, int], int], extent: Extent, start: int, memory: memoryview
    ) -> None:
        done = 0
        while done < len(memory):
            direct = self._file.direct
            try:
                count = move(memory[done:], extent.offset + start + done)
            except OSError as error:
                if direct and error.errno in REFUSALS:
                    self._file.go_buffered()
                    continue
                raise self._error(doing, extent, start + done, len(memory) - done, error) from error
            # The remaining request has to be aligned too.
            if direct and done + count < len(memory):
                count -= count % ALIGNMENT_BYTES
            if count == 0:
                why = "the file ends before" if doing == "reading" else "nothing was taken"
                raise self._error(doing, extent, start + done, len(memory) - done, why)
            done += count

    def _error(self, doing: str, extent: Extent, start: int, nbytes: int, why: OSError | str) -> StoreError:
        reason = (why.strerror or str(why)) if isinstance(why, OSError) else why
        return StoreError(
            f"{doing} {nbytes} bytes of {extent.name} at offset {extent.offset + start} of {str(self._file.path)!r}"
            f" failed ({reason}); what was kept there is lost, so go on from the last checkpoint."
        )


def request_threads(name: str) -> ThreadPoolExecutor:
    """Return a pool of threads that run requests, on the CUDA device of the calling thread.

    By default a new thread uses the first CUDA device. It would open a context there, which takes memory of the device
    of another rank.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def start() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    return ThreadPoolExecutor(REQUESTS, thread_name_prefix=f"lightning_largescale {name}", initializer=start)


class _Threads:
    """The threads that run requests. A forked process has none of its parent's threads, and starts its own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()

    def submit(self, request: Callable[..., None], *arguments: object) -> Future[None]:
        with self._lock:
            if self._pool is None or self._process != os.getpid():
                self._pool = request_threads("store")
                self._process = os.getpid()
            try:
                return self._pool.submit(request, *arguments)
            except RuntimeError as error:
                # Earlier requests of the same transfer are running, so the transfer's `wait` reports the failure.
                refused: Future[None] = Future()
                refused.set_exception(StoreError(f"a request came too late ({error})."))
                return refused

    def end(self, *, wait: bool) -> None:
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(wait=wait, cancel_futures=True)


class _Checksums:
    """Checksums of each block of `ALIGNMENT_BYTES` that was written."""

    def __init__(self) -> None:
        # 0 if no checksum is known; otherwise the CRC-32 with bit 32 set.
        self._known = array("Q")
        self._lock = threading.Lock()

    def note(self, offset: int, memory: memoryview) -> None:
        first, sums = offset // ALIGNMENT_BYTES, array("Q", _sums(memory))
        with self._lock:
            self._known.extend([0] * (first + len(sums) - len(self._known)))
            self._known[first : first + len(sums)] = sums

    def wrong(self, offset: int, memory: memoryview) -> int | None:
        """Return the offset in `memory` of the first block that differs; None if none does."""
        first = offset // ALIGNMENT_BYTES
        with self._lock:
            known = self._known[first : first + len(memory) // ALIGNMENT_BYTES]
        # Blocks beyond the end of `known` have no checksum.
        for index, (found, wanted) in enumerate(zip(_sums(memory), known, strict=False)):
            if wanted not in (0, found):
                return index * ALIGNMENT_BYTES
        return None


def _sums(memory: memoryview) -> Iterator[int]:
    starts = range(0, len(memory), ALIGNMENT_BYTES)
    return (zlib.crc32(memory[start : start + ALIGNMENT_BYTES]) | 1 << 32 for start in starts)


def _check_request(extent: Extent, memory: memoryview, start: int) -> None:
    if start < 0 or start + len(memory) > extent.nbytes:
        raise ValueError(f"{extent.name} has {extent.nbytes} bytes and {start + len(memory)} are asked for")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) if len(memory) else 0
    if any(number % ALIGNMENT_BYTES for number in (address, len(memory), start)):
        raise ValueError(
            f"{extent.name}: {len(memory)} bytes at address {address:#x}, for byte {start} on, are not aligned to"
            f" {ALIGNMENT_BYTES}"
        )


def _end(path: Path, file: DirectFile, threads: _Threads, lock: int, owner: int) -> None:
    # Requests keep their store alive, so none is running. This may run on one of the threads, which cannot join itself.
    threads.end(wait=False)
    file.close()
    # A forked process has a copy of the store and must not remove the folder.
    if os.getpid() != owner:
        os.close(lock)
        return
    remove(path, lock)
