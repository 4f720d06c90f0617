"""The folder of the nvme tier, and the folders of processes in it, each marked as in use by a lock.

The system releases the lock however its process ends, so a later start can detect the folders of dead processes.

Source: man page flock(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Disk
from lightning_largescale.hardware.disks import nvme_disk, over_network, refused_folder
from lightning_largescale.offload.direct import warn
from lightning_largescale.plan import Plan

FILE = "tensors"
_LOCK = "lock"
# An exact pattern, so that folders of other programs with similar names are not removed.
_NAME = re.compile(r"largescale-[0-9]+-[a-z0-9_]{8}")


def nvme_folder(plan: Plan, disks: Sequence[Disk], *, root: Path = Path("/")) -> Path:
    """Return the folder for the nvme tier of `plan`: its `nvme_path`, or one on the first of `disks` that is suitable.

    An `nvme_path` on a file system that is not a local disk is accepted with a warning, except for a network file
    system.

    Args:
        plan: The plan; its `nvme_path` is read.
        disks: The detected disks of this machine.
        root: The folder that holds `proc/self/mountinfo`.

    Raises:
        PlanError: The folder is missing, not writable, or on a network file system; or `nvme_path` is None and no disk
            is suitable.
    """
    if plan.nvme_path is None:
        return _detected(disks)
    folder = Path(plan.nvme_path).expanduser()
    with checked(folder), tempfile.TemporaryFile(dir=folder):
        pass
    reason = refused_folder(folder, root)
    if reason is None:
        return folder
    if over_network(folder, root):
        raise PlanError(f"nvme_path={plan.nvme_path!r} cannot be used: {reason}; give a folder on a local disk.")
    warn(f"nvme_path={plan.nvme_path!r} is no disk: {reason}; a folder on a local disk would serve.")
    return folder


def _detected(disks: Sequence[Disk]) -> Path:
    disk = nvme_disk(disks)
    if disk is not None:
        return Path(disk.path)
    why = "; ".join(f"{one.path}: {one.refused}" for one in disks) or "there is none that we may write to"
    raise PlanError(f"the nvme tier needs a folder on a local disk and none was found ({why}); give one as nvme_path.")


def remove_stale(folder: Path) -> None:
    """Remove the folders of dead processes in `folder`; folders in use, or that this process may not remove, stay.

    Args:
        folder: The folder of the nvme tier.
    """
    for path in folder.iterdir():
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            lock = _locked(path)
            if lock is not None:
                remove(path, lock)
        # A process that died before it locked its folder left it empty. A living process notices the removal and makes
        # another folder.
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def checked(folder: Path) -> Iterator[None]:
    """Context that raises a `PlanError` if `folder` is not a folder, or if an `OSError` shows that it is not usable."""
    try:
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise PlanError(f"nvme_path={str(folder)!r} {found}; give a folder on a local disk.")
        yield
    except OSError as error:
        raise PlanError(
            f"nvme_path={str(folder)!r} cannot be written to ({error.strerror}); give another folder on a local disk."
        ) from error


def own_folder(folder: Path) -> tuple[Path, int]:
    """Make a new folder in `folder` for this process, and return it with the descriptor of its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"largescale-{os.getpid()}-", dir=folder))
        # Until it is locked, another process may mistake it for that of a dead process and remove it.
        with contextlib.suppress(FileNotFoundError):
            lock = _locked(path, create=True)
            if lock is not None:
                return path, lock


def remove(path: Path, lock: int) -> None:
    """Remove a process's folder and release its lock.

    Args:
        path: The folder.
        lock: The descriptor of its lock, which this process holds.
    """
    # The file is large, so it is removed first: if the process dies meanwhile, the lock file is still there, and a
    # later start can recognize the folder as stale.
    with contextlib.suppress(OSError):
        (path / FILE).unlink()
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _locked(path: Path, *, create: bool = False) -> int | None:
    """Lock a process's folder, and return the descriptor that holds the lock; None if another process holds it."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    descriptor = os.open(path / _LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder may have removed the lock file.
        os.stat(path / _LOCK)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor
