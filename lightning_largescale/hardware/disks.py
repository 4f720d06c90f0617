"""Mounted file systems that can be the nvme tier, and the reasons why the others cannot.

Source: open(2), O_DIRECT; filesystems(5); Documentation/filesystems/overlayfs.rst ("Upper and Lower").
"""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from lightning_largescale.hardware.hardware import Disk
from lightning_largescale.hardware.mounts import Mount, mounts
from lightning_largescale.tiers import ALIGNMENT_BYTES

# File systems that hold users' files; all other mounts (proc, sysfs, cgroup, ...) are skipped silently.
_LOCAL = re.compile("ext[234]|xfs|btrfs|f2fs|zfs|bcachefs|jfs|reiserfs|nilfs2|ntfs3|hfsplus|ufs|overlay")
_NETWORK = re.compile(
    "nfs[34]?|cifs|smb3|smbfs|afs|coda|ceph|lustre|gpfs|beegfs|glusterfs|orangefs|pvfs2|ocfs2|gfs2|panfs|weka(fs)?|davfs"
    "|fuse[.](sshfs|glusterfs|ceph.*|s3.*|gcsfuse|goofys|juicefs|rclone|mount-s3|blobfuse2?|davfs.*)"
)
_REFUSED = {
    "tmpfs": "tmpfs keeps files in memory",
    "ramfs": "ramfs keeps files in memory",
    "vfat": "a file on vfat ends at 4 GiB",
    "9p": "9p is a share of the host, not a disk of this machine",
    "virtiofs": "virtiofs is a share of the host, not a disk of this machine",
    "ecryptfs": "ecryptfs passes everything through the page cache",
}
_IN_MEMORY_DEVICES = ("/dev/ram", "/dev/zram")
# Folders with the system's own small tmpfs mounts, which nobody would spill to.
_SYSTEM_FOLDERS = ("/proc", "/sys", "/run", "/dev")


def disks(root: Path = Path("/")) -> tuple[Disk, ...]:
    """Return the writable file systems, those that can be the nvme tier first, most free bytes first.

    A file system mounted in several places is listed once. Accepted file systems have been tried: one page was written
    with O_DIRECT to a file that was removed at once.

    Args:
        root: folder that holds `proc/self/mountinfo`; the mount points in it are this machine's own.

    Source: the module's docstring.
    """
    found = mounts(root)
    named: dict[str, Disk] = {}
    for mount in found:
        if mount.device in named or "ro" in mount.options or _is_the_systems(mount):
            continue
        folder = _writable_folder(mount, found)
        if folder is not None:
            named[mount.device] = _disk(mount, folder, found)
    return tuple(sorted(named.values(), key=lambda disk: (disk.refused is not None, -disk.free_bytes, disk.path)))


def nvme_disk(found: Sequence[Disk]) -> Disk | None:
    """Return the default disk of the nvme tier: of those that can be it, the one with the most free bytes."""
    disks = [disk for disk in found if disk.refused is None]
    return max(disks, key=lambda disk: disk.free_bytes, default=None)


def refusal(mount: Mount, found: list[Mount]) -> str | None:
    """Return why this kind of file system cannot be the nvme tier; None if it can, judged by its name.

    Args:
        mount: the file system in question.
        found: all mounts, to find the file system that an overlay writes to.
    """
    if mount.source.startswith(_IN_MEMORY_DEVICES):
        return f"{mount.source} keeps files in memory"
    if mount.filesystem == "overlay":
        upper = _upper_mount(mount, found)
        reason = None if upper is None else refusal(upper, found)
        return None if reason is None else f"what overlay writes goes to another file system, and {reason}"
    return _kind(mount.filesystem) or None


def disk_at(path: str | Path, root: Path = Path("/")) -> Disk:
    """Return the file system that holds a folder, as a disk with that folder as its writable folder.

    Args:
        path: a folder that exists.
        root: folder that holds `proc/self/mountinfo`.
    """
    found = mounts(root)
    mount = _holder(os.fspath(path), found)
    if mount is not None:
        return _disk(mount, os.fspath(path), found)
    room = os.statvfs(path)
    return Disk(path=os.fspath(path), filesystem="unknown", free_bytes=room.f_bavail * room.f_frsize)


def refused_folder(path: str | Path, root: Path = Path("/")) -> str | None:
    """Return why the file system of a folder cannot be the nvme tier; None if it can, judged by its name.

    Args:
        path: the folder.
        root: folder that holds `proc/self/mountinfo`.
    """
    found = mounts(root)
    mount = _holder(os.fspath(path), found)
    return None if mount is None else refusal(mount, found)


def over_network(path: str | Path, root: Path = Path("/")) -> bool:
    """Return whether writes to this folder go over the network.

    Args:
        path: the folder.
        root: folder that holds `proc/self/mountinfo`.
    """
    found = mounts(root)
    mount = _holder(os.fspath(path), found)
    while mount is not None and mount.filesystem == "overlay":
        mount = _upper_mount(mount, found)
    return mount is not None and _NETWORK.fullmatch(mount.filesystem) is not None


@contextmanager
def direct_file(folder: str | Path) -> Iterator[int]:
    """Yield the descriptor of an empty, unnamed file in `folder` that bypasses the page cache and is gone when closed.

    Raises:
        OSError: the folder is not writable, or its file system or the operating system has no O_DIRECT.
    """
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        raise OSError("this operating system has no O_DIRECT")
    named, name = tempfile.mkstemp(prefix=".largescale-", dir=folder)
    try:
        descriptor = os.open(name, os.O_RDWR | direct)
    finally:
        os.close(named)
        # The open descriptor keeps the file alive, and nothing is left behind however this process ends.
        os.unlink(name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_the_systems(mount: Mount) -> bool:
    """Return whether a mount is the system's own and holds no users' files."""
    own = PurePosixPath(mount.point)
    inside = any(own.is_relative_to(folder) for folder in _SYSTEM_FOLDERS) and mount.point != "/dev/shm"
    return inside or _kind(mount.filesystem) is None


def _kind(filesystem: str) -> str | None:
    """Return why a file system of this type is refused; "" if it is not, None if it holds no users' files."""
    if _LOCAL.fullmatch(filesystem):
        return ""
    if _NETWORK.fullmatch(filesystem):
        return f"{filesystem} is reached over the network"
    if filesystem.startswith(("fuse.", "fuseblk")):
        return f"{filesystem} is served by another process"
    return _REFUSED.get(filesystem)


def _upper_mount(mount: Mount, found: list[Mount]) -> Mount | None:
    """Return the mount that holds an overlay's written files; None if it is not visible, as in most containers."""
    upper = mount.option("upperdir")
    if upper is None or not os.path.isdir(upper):
        return None
    holder = _holder(upper, found)
    # In a container "/" is the overlay itself, and the folder is one of the host.
    return None if holder is mount else holder


def _writable_folder(mount: Mount, found: list[Mount]) -> str | None:
    """Return a writable folder of this mount, the usual places for files first; None if there is none."""
    for folder in (tempfile.gettempdir(), os.path.expanduser("~"), os.path.abspath("."), mount.point):
        # A later mount on the same point hides this one.
        if os.path.isdir(folder) and _holder(folder, found) is mount and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def _holder(folder: str, found: list[Mount]) -> Mount | None:
    """Return the mount that holds a folder: the one with the longest mount point above it, the latest of equals."""
    real = PurePosixPath(os.path.realpath(folder))
    above = [(len(mount.point), index) for index, mount in enumerate(found) if real.is_relative_to(mount.point)]
    return found[max(above)[1]] if above else None


def _disk(mount: Mount, folder: str, found: list[Mount]) -> Disk:
    refused = refusal(mount, found)
    try:
        room = os.statvfs(folder)
        free_bytes = room.f_bavail * room.f_frsize
    except OSError as error:
        return Disk(
            path=folder, filesystem=mount.filesystem, free_bytes=0, refused=f"it does not answer ({error.strerror})"
        )
    if refused is None:
        refused = _probe(folder)
    return Disk(path=folder, filesystem=mount.filesystem, free_bytes=free_bytes, refused=refused)


def _probe(folder: str) -> str | None:
    """Return why a page cannot be written to `folder` with O_DIRECT; None if it can."""
    try:
        with direct_file(folder) as descriptor, mmap.mmap(-1, ALIGNMENT_BYTES) as page:
            os.pwritev(descriptor, [page], 0)
    except OSError as error:
        return f"a page cannot be written there past the page cache ({error.strerror or error})"
    return None
