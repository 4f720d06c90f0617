"""File systems that tests mount for themselves, where they may."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, options: str = "size=1m") -> Iterator[None]:
    """A tmpfs on `folder`; the test is skipped where none can be mounted."""
    with _mounted("-t", "tmpfs", "-o", options, "none", str(folder)):
        yield


@contextlib.contextmanager
def mounted_ext4(folder: Path, image: Path, nbytes: int) -> Iterator[None]:
    """A new ext4 on `folder`, kept in the file `image`; the test is skipped where none can be made."""
    with image.open("wb") as file:
        file.truncate(nbytes)
    try:
        made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mkfs.ext4")
    if made.returncode:
        pytest.skip("ext4 cannot be made here")
    with _mounted("-o", "loop", str(image), str(folder)):
        yield


@contextlib.contextmanager
def _mounted(*arguments: str) -> Iterator[None]:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", arguments[-1]], check=True)
