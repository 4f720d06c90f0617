"""pytest on the pretended device: tests marked `gpu` run on it and fail on what it reports, in all their processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import pretend_cuda
from pretend_cuda import peaks
from pretend_cuda.sites import PACKAGE

# As many as the tests have ranks.
DEVICES = 4


def load(config: pytest.Config) -> str:
    """Pretend a device for this session, if there is none; why that cannot be, as a sentence, or nothing."""
    import torch

    if torch.cuda.is_available():
        return ""
    try:
        extension = pretend_cuda.install(DEVICES)
    except pretend_cuda.CannotBuild as error:
        return str(error)
    reports = Path(tempfile.mkdtemp(prefix="pretend_cuda_")) / "reports"
    os.environ |= pretend_cuda.environment(DEVICES, reports=str(reports))
    extension.set_report_file(str(reports))
    # Kernels run late, on whichever thread of the host waits: what they add up is to be the same on each.
    torch.set_num_threads(1)
    peaks.watch()
    config.pluginmanager.register(_Reports(reports), "pretend_cuda_reports")
    return ""


class _Reports:
    """Fails the test under which the device reported something, in whichever process."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, Any, Any]:
        # Of what the test before left behind.
        self._new()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        result = yield
        self._check(item)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        result = yield
        self._check(item)
        return result

    def pytest_unconfigure(self) -> None:
        self._path.unlink(missing_ok=True)
        self._path.parent.rmdir()

    def _check(self, item: pytest.Item) -> None:
        wrong = [line for line in self._new() if not is_forgiven(line)]
        if wrong:
            pytest.fail("the pretended device reports:\n" + "\n".join(wrong), pytrace=False)

    def _new(self) -> list[str]:
        if not self._path.exists():
            return []
        with open(self._path) as file:
            file.seek(self._read)
            lines = file.read().splitlines()
            self._read = file.tell()
        return lines


def is_forgiven(line: str) -> bool:
    """Whether a test does not fail on this report: what users and Lightning copy from pageable memory they may pin."""
    kind, _, text = line.partition(": ")
    return kind == "pageable" and not text.rpartition(", at ")[2].startswith(f"{PACKAGE}/")
