"""Tensors in files: aligned requests past the page cache, several under way at once, reads beside writes.

Threads with preadv and pwritev reach the disk's own rate; the GIL is not held in a request. Each process has a folder
of its own below `nvme_path`, which a lock marks as in use for as long as the process lives, so that the next start can
tell what a dead one has left behind and remove it.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 6.3 (DeepNVMe); man pages open(2), O_DIRECT, and flock(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_largescale.plan import PlanError
from lightning_largescale.tiers import ALIGNMENT_BYTES, REQUEST_BYTES, REQUESTS, aligned
from lightning_largescale.units import format_bytes

_PREFIX, _LOCK, _FILE = "largescale-", "lock", "tensors"
_VERIFY = "LARGESCALE_STORE_VERIFY"


class StoreError(RuntimeError):
    """A file of the store could not be read or written; the message names it, the tensors, and the offset."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of the store's file.

    Attributes:
        name: of what is kept there.
        offset: of its first byte, a multiple of `ALIGNMENT_BYTES`.
        nbytes: its length, a multiple of `ALIGNMENT_BYTES`.
    """

    name: str
    offset: int
    nbytes: int


class Transfer:
    """Requests that are under way."""

    def __init__(self, requests: Sequence[Future[None]] = ()) -> None:
        self._requests = requests

    @classmethod
    def of(cls, transfers: Sequence[Transfer]) -> Transfer:
        """All of `transfers` as one."""
        return cls([request for transfer in transfers for request in transfer._requests])

    def wait(self) -> None:
        """Until all are done.

        Raises:
            StoreError: one of them failed.
        """
        requests, self._requests = self._requests, ()
        for request in requests:
            request.exception()
        for request in requests:
            request.result()


class DirectFile:
    """A file whose requests go past the page cache where its file system lets them.

    Args:
        path: of a file that is made.

    Attributes:
        path: as given.
        descriptor: of the file.
        direct: whether the page cache is passed.

    Source: man page open(2), O_DIRECT.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            self.descriptor = os.open(path, flags, 0o600)
        if not self.direct:
            rank_zero_warn(
                f"{str(path.parent)!r} is on a file system without O_DIRECT, so what is kept there goes through the"
                " page cache; a folder on a local disk is faster."
            )

    def reserve(self, offset: int, nbytes: int) -> None:
        """Have the file system set `nbytes` aside from `offset` on."""
        os.posix_fallocate(self.descriptor, offset, nbytes)

    def read_at(self, memory: memoryview, offset: int) -> int:
        """Bytes read into `memory`, which may be fewer than it has."""
        return os.preadv(self.descriptor, [memory], offset)

    def write_at(self, memory: memoryview, offset: int) -> int:
        """Bytes written of `memory`, which may be fewer than it has."""
        return os.pwritev(self.descriptor, [memory], offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class Store:
    """A file of tensors in a folder of this process's own, removed with it.

    Args:
        folder: on the disk of the nvme tier; what dead processes have left there is removed.
        verify: whether a checksum is kept of each request's bytes, and compared when they are read again; None for what
            the environment variable LARGESCALE_STORE_VERIFY says, "1" or not. It is for bytes that go through the
            store: what is written into a mapping of the file in between is not known to it.
        file: what the requests go to.

    Attributes:
        path: the folder.
        read_bytes: read so far.
        written_bytes: written so far.

    Raises:
        PlanError: there is no such folder, or it cannot be written to.
    """

    def __init__(self, folder: str | Path, *, verify: bool | None = None, file: type[DirectFile] = DirectFile) -> None:
        folder = Path(folder)
        _check_folder(folder)
        remove_stale(folder)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder))
        lock = _locked(self.path)
        assert lock is not None
        self._file = file(self.path / _FILE)
        self._end = 0
        self._checksums: _Checksums | None = None
        if os.environ.get(_VERIFY) == "1" if verify is None else verify:
            self._checksums = _Checksums()
        self._threads = ThreadPoolExecutor(REQUESTS, thread_name_prefix="lightning_largescale store")
        self.read_bytes, self.written_bytes = 0, 0
        self._finalizer = weakref.finalize(self, _remove, self.path, self._file, self._threads, lock, os.getpid())

    @property
    def descriptor(self) -> int:
        """Of the file, to map it."""
        return self._file.descriptor

    def reserve(self, name: str, nbytes: int) -> Extent:
        """Set space aside, so that no write can meet a full disk.

        Args:
            name: of what is to be kept there, for messages.
            nbytes: rounded up to a multiple of `ALIGNMENT_BYTES`.

        Raises:
            PlanError: the disk has not as many.
        """
        extent = Extent(name, self._end, max(ALIGNMENT_BYTES, aligned(nbytes)))
        try:
            self._file.reserve(extent.offset, extent.nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._error("setting aside", extent, 0, extent.nbytes, error) from error
            room = os.statvfs(self.path)
            raise PlanError(
                f"{name} needs {format_bytes(extent.nbytes, up=True)} on {str(self.path.parent)!r} and there are"
                f" {format_bytes(room.f_bavail * room.f_frsize)} ({error.strerror}); free some, or give another folder"
                " as nvme_path."
            ) from error
        self._end += extent.nbytes
        return extent

    def read(self, extent: Extent, memory: memoryview, start: int = 0) -> Transfer:
        """Begin to read into `memory`.

        Args:
            extent: what to read from.
            memory: bytes at an address, and of a length, that are multiples of `ALIGNMENT_BYTES`; not to be touched
                until the transfer is over.
            start: the first byte in the extent, such a multiple too.
        """
        self.read_bytes += len(memory)
        return self._begin(self._read, extent, memory, start)

    def write(self, extent: Extent, memory: memoryview, start: int = 0) -> Transfer:
        """Begin to write `memory`; arguments as of `read`."""
        self.written_bytes += len(memory)
        return self._begin(self._write, extent, memory, start)

    def close(self) -> None:
        """End what is under way and remove the folder; mappings of the file stay valid."""
        self._finalizer()

    def _begin(
        self, request: Callable[[Extent, int, memoryview], None], extent: Extent, memory: memoryview, start: int
    ) -> Transfer:
        if start + len(memory) > extent.nbytes:
            raise ValueError(f"{extent.name} has {extent.nbytes} bytes and {start + len(memory)} are asked for")
        parts = range(0, len(memory), REQUEST_BYTES)
        return Transfer(
            [self._threads.submit(request, extent, start + part, memory[part : part + REQUEST_BYTES]) for part in parts]
        )

    def _read(self, extent: Extent, start: int, memory: memoryview) -> None:
        done = 0
        while done < len(memory):
            try:
                count = self._file.read_at(memory[done:], extent.offset + start + done)
            except OSError as error:
                raise self._error("reading", extent, start + done, len(memory) - done, error) from error
            if count == 0:
                raise self._error("reading", extent, start + done, len(memory) - done, "the file ends before")
            done += count
        if self._checksums is not None and not self._checksums.fits(extent.offset + start, memory):
            raise self._error("reading", extent, start, len(memory), "these are not the bytes that were written")

    def _write(self, extent: Extent, start: int, memory: memoryview) -> None:
        if self._checksums is not None:
            self._checksums.note(extent.offset + start, memory)
        done = 0
        while done < len(memory):
            try:
                done += self._file.write_at(memory[done:], extent.offset + start + done)
            except OSError as error:
                raise self._error("writing", extent, start + done, len(memory) - done, error) from error

    def _error(self, doing: str, extent: Extent, start: int, nbytes: int, why: OSError | str) -> StoreError:
        reason = (why.strerror or str(why)) if isinstance(why, OSError) else why
        return StoreError(
            f"{doing} {nbytes} bytes of {extent.name} at offset {extent.offset + start} of {str(self._file.path)!r}"
            f" failed ({reason}); what was kept there is lost, so go on from the last checkpoint."
        )


class _Checksums:
    """Of the bytes of each request that wrote, until others write over some of them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def note(self, offset: int, memory: memoryview) -> None:
        found = zlib.crc32(memory)
        end = offset + len(memory)
        with self._lock:
            # No request is longer, so nothing that began earlier reaches here.
            near = [start for start in self._known if offset - REQUEST_BYTES < start < end]
            for start in near:
                if start + self._known[start][0] > offset:
                    del self._known[start]
            self._known[offset] = len(memory), found

    def fits(self, offset: int, memory: memoryview) -> bool:
        known = self._known.get(offset)
        return known is None or known[0] != len(memory) or known[1] == zlib.crc32(memory)


def remove_stale(folder: Path) -> None:
    """Remove what processes that are no more have left in `folder`; what others use, or own, stays."""
    for path in folder.glob(f"{_PREFIX}*"):
        if not (path / _LOCK).is_file():
            continue
        with contextlib.suppress(OSError):
            lock = _locked(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def stores_in(folder: Path) -> Iterator[Path]:
    """Folders of stores, of whatever process."""
    return (path for path in folder.glob(f"{_PREFIX}*") if (path / _LOCK).exists())


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise PlanError(f"nvme_path={str(folder)!r} is no folder; give one on a local disk.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlanError(
            f"nvme_path={str(folder)!r} cannot be written to ({error.strerror}); give another folder on a local disk."
        ) from error


def _locked(path: Path) -> int | None:
    """The descriptor of the lock of a store's folder, which marks it as in use while it is open; None where it is."""
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor


def _remove(path: Path, file: DirectFile, threads: ThreadPoolExecutor, lock: int, owner: int) -> None:
    # A forked process has a copy of the store, which is not its own to remove.
    if os.getpid() != owner:
        return
    threads.shutdown(wait=True, cancel_futures=True)
    file.close()
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
