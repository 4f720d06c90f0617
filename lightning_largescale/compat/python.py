"""Private APIs of Python."""

from __future__ import annotations

import sys
from threading import Thread
from types import FrameType
from typing import Any


def frame_of(thread: Thread) -> FrameType | None:
    """Return the innermost frame of `thread`; None if it does not run.

    Replaced by a public way to read another thread's stack, as `faulthandler` prints it.
    """
    return sys._current_frames().get(thread.ident or 0)


def target_of(thread: Thread) -> Any:
    """Return the function that `thread` runs; None if its class overrides `run`, or if the thread has ended.

    Replaced by a public `Thread.target`.
    """
    return getattr(thread, "_target", None)
