"""Whether this machine survives an operation, asked of a child process.

A processor may claim instructions that its hypervisor does not carry out: then a bfloat16 product, which oneDNN
writes with AMX instructions where it believes to have them, ends the process by SIGILL, and no handler can save it.

Source: fork(2), waitpid(2), signal(7).
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from time import perf_counter, sleep

import torch

_POLL_SECONDS = 0.002


def survives(run: Callable[[], object], *, seconds: float = 2.0) -> bool:
    """Whether a child process that calls `run` on one thread ends well; True where the system is not Linux.

    Args:
        run: what may end the process. It raises, hangs or dies at no cost to the caller.
        seconds: how long the child may take before it counts as hung and is ended.

    Source: the module's docstring.
    """
    if sys.platform != "linux":
        return True
    try:
        with warnings.catch_warnings():
            # Python warns of forking beside threads; the child starts none and takes no lock but those of `run`.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    except OSError:
        return False
    if child == 0:
        _be_the_child(run)
    deadline = perf_counter() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        if perf_counter() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        sleep(_POLL_SECONDS)


def _be_the_child(run: Callable[[], object]) -> None:
    """Call `run` and end this process: status 0 if it returned. Nothing of the parent's is flushed or torn down."""
    status = 1
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The threads of the parent's pool are not in the child; more than one would wait for them.
        torch.set_num_threads(1)
        run()
        status = 0
    finally:
        os._exit(status)
