"""Probe, in a child process, whether an operation ends the process on this machine.

A processor may report instructions that its hypervisor does not execute. A bfloat16 product, for which oneDNN uses AMX
instructions if they are reported, then ends the process by SIGILL, which no handler can prevent.

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
    """Return whether a child process that calls `run` on one thread succeeds; True if the system is not Linux.

    Args:
        run: the function that may end the process. It may raise, hang or die without effect on the caller.
        seconds: time after which the child counts as hung and is killed.

    Source: the module's docstring.
    """
    if sys.platform != "linux":
        return True
    try:
        with warnings.catch_warnings():
            # Python warns of forks beside threads; the child starts no threads and takes no locks but those of `run`.
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
    """Call `run` and exit, with status 0 if it returned, without flushing or tearing down the parent's state."""
    status = 1
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The child lacks the threads of the parent's pool; with more than one thread it would wait for them.
        torch.set_num_threads(1)
        run()
        status = 0
    finally:
        os._exit(status)
