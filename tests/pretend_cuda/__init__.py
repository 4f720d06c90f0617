"""A pretended CUDA device for a CPU build of torch; the README beside says what it does and what it does not.

`install()` once, before anything looks at torch.cuda.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

from pretend_cuda import build
from pretend_cuda.build import CannotBuild

__all__ = ["CannotBuild", "build", "environment", "install", "installed", "report_file"]

# What a process that is started with these in its environment pretends, and where it writes what the device reports.
SETTINGS, REPORTS = "LARGESCALE_PRETEND_CUDA", "LARGESCALE_PRETEND_REPORTS"

_extension: ModuleType | None = None


def install(devices: int = 2, memory: int = 4 << 30, late: bool = True) -> ModuleType:
    """Have torch see CUDA devices in this process, in its forks, and in no other; the extension that they are made by.

    Args:
        devices: how many.
        memory: bytes of each, its context among them.
        late: what is given to a stream is done as late as what waits for it allows, at once otherwise.

    Raises:
        CannotBuild: there is no compiler, or no header of Python.
        RuntimeError: torch is built for CUDA.
    """
    global _extension
    if _extension is not None:
        return _extension
    import torch

    if torch.version.cuda is not None:
        raise RuntimeError(
            f"a CUDA device can be pretended to a CPU build of torch only, and this is {torch.__version__}."
        )
    _extension = build.load_extension()
    _extension.set_devices(devices)
    _extension.set_late(late)
    for index in range(devices):
        _extension.set_limit(index, memory)
    _extension.set_report_file(report_file())

    from pretend_cuda import nccl, sites, torch_cuda

    torch_cuda.install(_extension, devices)
    nccl.install(_extension)
    _extension.set_call_site(sites.call_site)
    return _extension


def installed() -> ModuleType | None:
    """The extension, where a device is pretended."""
    return _extension


def report_file() -> str:
    """Where this process writes what the device reports; empty for nowhere."""
    return os.environ.get(REPORTS, "")


def environment(devices: int = 2, memory: int = 4 << 30, late: bool = True, reports: str = "") -> dict[str, str]:
    """Variables with which a Python process, and those that it starts, install the device when they import torch."""
    paths = [str(Path(__file__).parent / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        SETTINGS: f"{devices},{memory},{int(late)}",
        REPORTS: reports,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }


def install_from_environment() -> None:
    """Install what the environment says; what sitecustomize calls when torch is imported."""
    devices, memory, late = os.environ[SETTINGS].split(",")
    try:
        install(int(devices), int(memory), late == "1")
    except CannotBuild as error:
        print(error, file=sys.stderr)
