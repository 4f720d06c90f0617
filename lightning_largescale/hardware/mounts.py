"""Mounted file systems of this process, as the kernel lists them.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo.

    Attributes:
        device: "major:minor" of the file system; equal for two mounts of the same file system.
        root: the folder of the file system that is mounted; not "/" for a bind mount or in a container.
        point: the mount point.
        filesystem: the kernel's name of the file system's type.
        source: the device, or what the file system's type calls a source.
        options: options of this mount and of the file system, such as "rw" or "upperdir=/x".
    """

    device: str
    root: str
    point: str
    filesystem: str
    source: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """Return the value of `name=value` among the options; None if it is missing."""
        return next((option[len(name) + 1 :] for option in self.options if option.startswith(f"{name}=")), None)


def mounts(root: Path = Path("/")) -> list[Mount]:
    """Return the mounts in the order of mounting; none if the system has no such list.

    Args:
        root: folder that holds `proc/self/mountinfo`.
    """
    try:
        # Paths may be any bytes; surrogateescape keeps paths that are not UTF-8 usable.
        lines = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if len(left) < 6 or len(right) < 3:
            continue
        found.append(
            Mount(
                device=left[2],
                root=_unescape(left[3]),
                point=_unescape(left[4]),
                options=tuple(_unescape(option) for option in f"{left[5]},{right[2]}".split(",")),
                filesystem=right[0],
                source=_unescape(right[1]),
            )
        )
    return found


def _unescape(text: str) -> str:
    # Space, tab, newline and backslash are written as three octal digits.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
