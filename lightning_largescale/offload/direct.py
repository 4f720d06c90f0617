"""A file that is read and written with O_DIRECT, bypassing the page cache.

Source: man pages open(2), O_DIRECT, and posix_fallocate(3).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

# Error numbers of file systems that do not support O_DIRECT, or cannot reserve space.
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class DirectFile:
    """A file whose requests bypass the page cache if its file system supports that.

    Args:
        path: The path of the file; created if it does not exist.

    Attributes:
        path: The path of the file.
        descriptor: Its file descriptor; -1 once it is closed.
        direct: Whether requests bypass the page cache.

    Source: man page open(2), O_DIRECT.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self.direct = False
            self.descriptor = os.open(path, flags, 0o600)
        self._lock = threading.Lock()
        if not self.direct:
            try:
                self._warn()
            except Warning:
                self.close()
                raise

    def reserve(self, offset: int, nbytes: int) -> None:
        """Reserve `nbytes` of disk space from `offset`, the end of the file, on.

        Raises:
            OSError: The file system has too little free space; the file keeps its size.
        """
        try:
            os.posix_fallocate(self.descriptor, offset, nbytes)
        except OSError as error:
            # Some file systems keep the space that they reserved before they ran out.
            os.ftruncate(self.descriptor, offset)
            if error.errno not in REFUSALS:
                raise
            # This file system cannot reserve space, so only the free space of this moment can be checked.
            if nbytes > self.free_bytes():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            os.ftruncate(self.descriptor, offset + nbytes)

    def free_bytes(self) -> int:
        """Return the bytes that this process may still write on the file system."""
        room = os.fstatvfs(self.descriptor)
        return room.f_bavail * room.f_frsize

    def read_at(self, memory: memoryview, offset: int) -> int:
        """Read into `memory`, and return the number of bytes read, which may be fewer than its size."""
        return os.preadv(self.descriptor, [memory], offset)

    def write_at(self, memory: memoryview, offset: int) -> int:
        """Write `memory`, and return the number of bytes written, which may be fewer than its size."""
        return os.pwritev(self.descriptor, [memory], offset)

    def go_buffered(self) -> None:
        """Send requests through the page cache from now on.

        Some file systems accept O_DIRECT on open, and refuse the requests.
        """
        with self._lock:
            if not self.direct:
                return
            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            self.direct = False
        self._warn()

    def close(self) -> None:
        """Close the file, if it is open."""
        # By a second call the descriptor's number may belong to another file.
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor != -1:
            os.close(descriptor)

    def _warn(self) -> None:
        warn(
            f"{str(self.path.parent)!r} is on a file system without O_DIRECT, so what is kept there goes through the"
            " page cache; a folder on a local disk is faster."
        )


def warn(message: str) -> None:
    """Warn on rank 0 alone."""
    # Importing this module sets the rank in lightning_utilities.
    from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

    rank_zero_warn(message)
