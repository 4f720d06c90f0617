"""Private APIs of Python."""

from __future__ import annotations

import sys
from threading import Thread
from types import FrameType


def frame_of(thread: Thread) -> FrameType | None:
    """Where `thread` is in its code; None where it does not run.

    Replaced by a public way to ask for another thread's stack, as `faulthandler` prints it.
    """
    return sys._current_frames().get(thread.ident or 0)
