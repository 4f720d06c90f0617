"""A file past the page cache.

Source: man pages open(2), O_DIRECT, and posix_fallocate(3).
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

# How file systems say that they have no O_DIRECT, or nothing to set space aside with.
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


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
        """Have the file system set `nbytes` aside from `offset`, the end of the file, on.

        Raises:
            OSError: it has not as many; the file ends where it did.
        """
        try:
            os.posix_fallocate(self.descriptor, offset, nbytes)
        except OSError as error:
            # Some file systems keep what they found before they ran out.
            os.ftruncate(self.descriptor, offset)
            if error.errno not in REFUSALS:
                raise
            # Nothing can be set aside here: what is free now has to do.
            if nbytes > self.free_bytes():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            os.ftruncate(self.descriptor, offset + nbytes)

    def free_bytes(self) -> int:
        """What we may still write on its file system."""
        room = os.fstatvfs(self.descriptor)
        return room.f_bavail * room.f_frsize

    def read_at(self, memory: memoryview, offset: int) -> int:
        """Bytes read into `memory`, which may be fewer than it has."""
        return os.preadv(self.descriptor, [memory], offset)

    def write_at(self, memory: memoryview, offset: int) -> int:
        """Bytes written of `memory`, which may be fewer than it has."""
        return os.pwritev(self.descriptor, [memory], offset)

    def go_buffered(self) -> None:
        """Take requests through the page cache from now on, for file systems that refuse the others only when they
        come.
        """
        with self._lock:
            if not self.direct:
                return
            flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            self.direct = False
        self._warn()

    def close(self) -> None:
        """Close the file, if it is not."""
        # The number may be another file's by the second time.
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
    # Its import is what tells lightning_utilities the rank.
    from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

    rank_zero_warn(message)
