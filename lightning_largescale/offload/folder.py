"""The folder of the nvme tier, and in it those of processes, each marked as in use by a lock.

The lock is let go of however its process ends, so the next start can tell what a dead one has left behind.

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
# What another program keeps in a folder of a similar name is not ours to remove.
_NAME = re.compile(r"largescale-[0-9]+-[a-z0-9_]{8}")


def nvme_folder(plan: Plan, disks: Sequence[Disk], *, root: Path = Path("/")) -> Path:
    """The folder that `plan` keeps its nvme tier in: its own, or one on the first of `disks` that can be that tier.

    A folder on a file system that is no disk of this machine is taken with a warning, but for a network's.

    Args:
        plan: whose `nvme_path` is asked for.
        disks: of this machine, as detected.
        root: folder that holds `proc/self/mountinfo`.

    Raises:
        PlanError: the folder is missing, cannot be written to, or is on a network; or none was given and none found.
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
    """Remove what processes that are no more have left in `folder`; what others use, or own, stays.

    Args:
        folder: of the nvme tier.
    """
    for path in folder.iterdir():
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            lock = _locked(path)
            if lock is not None:
                remove(path, lock)
        # One whose process died before it locked it is empty; a living process notices.
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def checked(folder: Path) -> Iterator[None]:
    """Tell in a PlanError why `folder` cannot be used, where an OSError says so."""
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
    """A new folder in `folder` for this process, and the descriptor of its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"largescale-{os.getpid()}-", dir=folder))
        # Until it is locked another process may take it for a dead one's, and remove it.
        with contextlib.suppress(FileNotFoundError):
            lock = _locked(path, create=True)
            if lock is not None:
                return path, lock


def remove(path: Path, lock: int) -> None:
    """Remove a process's folder and let its lock go.

    Args:
        path: the folder.
        lock: descriptor of its lock, which this process holds.
    """
    # Large, so first: a process that dies meanwhile leaves the lock, by which the next start tells it as stale.
    with contextlib.suppress(OSError):
        (path / FILE).unlink()
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _locked(path: Path, *, create: bool = False) -> int | None:
    """The descriptor of the lock of a process's folder, held while it is open; None where another holds it."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    descriptor = os.open(path / _LOCK, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who held it until now may have removed it.
        os.stat(path / _LOCK)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor
