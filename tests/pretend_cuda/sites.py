"""Where in the program a thread is, for reports."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

PACKAGE = "lightning_largescale"
_OTHERS = ("/torch/", "/lightning/", "/pretend_cuda/sites.py", "/pretend_cuda/torch_cuda.py", "/contextlib.py", "<")


def call_site() -> str:
    """The innermost call that stands in the package, or else the innermost that is not torch's."""
    frame: FrameType | None = sys._getframe()
    other = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if f"/{PACKAGE}/" in path:
            return _words(frame, f"{PACKAGE}/" + path.rpartition(f"/{PACKAGE}/")[2])
        if not other and not any(one in path for one in _OTHERS):
            other = _words(frame, Path(path).name)
        frame = frame.f_back
    return other


def _words(frame: FrameType, path: str) -> str:
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
