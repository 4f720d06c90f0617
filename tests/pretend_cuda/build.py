"""The device's extension, compiled once for each torch, Python and text of the sources, and kept in a cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).parent / "source"
NAME = "pretend_cuda_device"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", f"-DTORCH_EXTENSION_NAME={NAME}"]
LIBRARIES = ["c10", "torch_cpu", "torch", "torch_python"]


class CannotBuild(RuntimeError):
    """This machine lacks what the extension is compiled with, as one sentence says."""


def cache_folder() -> Path:
    """Where built extensions lie: `$LARGESCALE_PRETEND_CACHE`, or a folder in the user's cache."""
    given = os.environ.get("LARGESCALE_PRETEND_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "largescale-pretend-cuda"


def load_extension() -> ModuleType:
    """The extension as a module, built before where it is not.

    Raises:
        CannotBuild: there is no compiler, or no header of Python.
    """
    import torch  # noqa: F401  what the extension is linked with

    spec = importlib.util.spec_from_file_location(NAME, built())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built() -> Path:
    """The extension's file; of processes that ask at once, one builds it and the others wait.

    Raises:
        CannotBuild: as load_extension.
    """
    folder = cache_folder() / _fingerprint()
    target = folder / f"{NAME}.so"
    if target.exists():
        return target
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                os.replace(_compile(compiler, Path(scratch)), target)
    return target


def _fingerprint() -> str:
    import torch

    texts = [path.read_bytes() for path in sorted(SOURCE.iterdir())]
    stated = [torch.__version__, sys.version, *FLAGS]
    return hashlib.sha256(b"\0".join([*texts, *(one.encode() for one in stated)])).hexdigest()[:16]


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        raise CannotBuild("A pretended CUDA device is compiled with g++, which is not here: sudo apt install g++.")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise CannotBuild("A pretended CUDA device needs Python.h, which is not here: sudo apt install python3-dev.")
    return found


def _compile(compiler: str, scratch: Path) -> Path:
    import torch

    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    flags = [*FLAGS, *(word for one in includes for word in ("-isystem", str(one)))]

    def compile_one(source: Path) -> str:
        target = str(scratch / f"{source.stem}.o")
        _run([compiler, *flags, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as threads:
        objects = list(threads.map(compile_one, sorted(SOURCE.glob("*.cpp"))))
    target = scratch / f"{NAME}.so"
    libraries = [f"-L{root / 'lib'}", *(f"-l{one}" for one in LIBRARIES)]
    _run([compiler, "-shared", *objects, *libraries, "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    begun = time.perf_counter()
    print(built(), f"({time.perf_counter() - begun:.0f} s)")
