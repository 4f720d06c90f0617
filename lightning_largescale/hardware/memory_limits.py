"""DRAM that one rank may allocate: free memory, under the limits of control groups and of the process.

Free memory and the limits of control groups are shared by the ranks of a node, and divided among them. RLIMIT_DATA and
RLIMIT_AS are limits of each process, and are not divided.

Source: the kernel's admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst ("Memory"); proc_pid_cgroup(5); getrlimit(2).
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import psutil

from lightning_largescale.hardware.mounts import Mount, mounts

# cgroup v1 writes "no limit" as the largest whole number of pages, a little under 2**63.
_NO_LIMIT_BYTES = 2**60

_STATUS_FIELD = {resource.RLIMIT_DATA: "VmData", resource.RLIMIT_AS: "VmSize"}


def rank_memory(ranks_per_node: int, root: Path = Path("/")) -> tuple[int, int]:
    """Return the total DRAM of one rank, and the DRAM it may still allocate, in bytes.

    Args:
        ranks_per_node: number of processes that share the node's memory evenly.
        root: folder that holds `proc` and `sys`.

    Source: the module's docstring.
    """
    total_bytes, available_bytes = machine_memory(root)
    for limit_bytes, usage_bytes in cgroup_limits(root):
        total_bytes = min(total_bytes, limit_bytes)
        available_bytes = min(available_bytes, limit_bytes - usage_bytes)
    total_bytes //= ranks_per_node
    available_bytes //= ranks_per_node
    for limit_bytes, usage_bytes in process_limits(root):
        total_bytes = min(total_bytes, limit_bytes)
        available_bytes = min(available_bytes, limit_bytes - usage_bytes)
    return total_bytes, max(0, min(total_bytes, available_bytes))


def machine_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return MemTotal and MemAvailable in bytes; psutil's figures if there is no /proc/meminfo."""
    fields = _kibibyte_fields(root / "proc/meminfo")
    if "MemTotal" in fields and "MemAvailable" in fields:
        return fields["MemTotal"], fields["MemAvailable"]
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def cgroup_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield `(limit, usage)` in bytes of every limited control group, from this process's own up to the root.

    Usage excludes the page cache that the kernel would drop first (inactive_file).
    """
    for mount, group in _memory_groups(root):
        v2 = mount.filesystem == "cgroup2"
        while True:
            folder = root / mount.point.lstrip("/") / group.relative_to("/")
            # memory.high is no hard limit, but above it the kernel slows the process down until it is under again.
            names = ("memory.max", "memory.high") if v2 else ("memory.limit_in_bytes",)
            limits = [limit for name in names if (limit := _whole_number(folder / name)) is not None]
            usage = _whole_number(folder / ("memory.current" if v2 else "memory.usage_in_bytes"))
            if usage is not None and limits and min(limits) < _NO_LIMIT_BYTES:
                reclaimable = _stat(folder / "memory.stat", "inactive_file" if v2 else "total_inactive_file")
                yield min(limits), max(0, usage - reclaimable)
            if group == group.parent:
                break
            group = group.parent


def process_limits(root: Path = Path("/"), limits: Mapping[int, int] | None = None) -> Iterator[tuple[int, int]]:
    """Yield `(limit, usage)` in bytes of RLIMIT_DATA and RLIMIT_AS, for each that is set.

    Args:
        root: folder that holds `proc/self/status`.
        limits: soft limits by resource number; None reads them from the system.
    """
    if limits is None:
        limits = {number: resource.getrlimit(number)[0] for number in _STATUS_FIELD}
    fields = _kibibyte_fields(root / "proc/self/status")
    for number, name in _STATUS_FIELD.items():
        limit = limits.get(number, resource.RLIM_INFINITY)
        if limit not in (resource.RLIM_INFINITY, -1) and limit < _NO_LIMIT_BYTES:
            yield limit, fields.get(name, 0)


def _memory_groups(root: Path) -> Iterator[tuple[Mount, PurePosixPath]]:
    """Yield the mounts of the memory controller, each with this process's group as a path below the mount point."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    found = mounts(root)
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            wanted = [mount for mount in found if mount.filesystem == "cgroup" and "memory" in mount.options]
        elif number == "0" and not controllers:
            wanted = [mount for mount in found if mount.filesystem == "cgroup2"]
        else:
            continue
        for mount in wanted[:1]:
            yield mount, _below(PurePosixPath(path), PurePosixPath(mount.root))


def _below(group: PurePosixPath, mount_root: PurePosixPath) -> PurePosixPath:
    """Return the group's path below a mount of `mount_root`; the mount's own folder if the group is not below it.

    In a container the mount shows only a part of the tree. Its own folder is then the tightest visible group.
    """
    if ".." in group.parts or not group.is_relative_to(mount_root):
        return PurePosixPath("/")
    return PurePosixPath("/") / group.relative_to(mount_root)


def _kibibyte_fields(path: Path) -> dict[str, int]:
    """Return the fields of lines such as `MemTotal:  24682416 kB` in bytes; none if the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in words if len(line) == 3 and line[2] == "kB"}


def _whole_number(path: Path) -> int | None:
    """Return the integer in a file; None if the file is missing, unreadable or has a word such as "max"."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _stat(path: Path, name: str) -> int:
    """Return the field `name` of a file of `name value` lines; 0 if it is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
