"""Run a function in a fork of this process, so that whatever it does to the process is not done here.

To trace a step is to run the user's code once more than the user asked for: counters count, streams are read, mocks are
called. In a fork none of that is seen, and a crash ends the fork alone.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from lightning_largescale import compat
from lightning_largescale.hub import describe_exit
from lightning_largescale.plan import PlanError

_Result = TypeVar("_Result")
# A fork that waits for a lock that a thread of this process held would wait for ever.
_TIMEOUT_SECONDS = 300.0


class ApartError(RuntimeError):
    """The fork ended without a result."""


def can_run_apart() -> bool:
    """Whether a fork can do what this process can.

    Not where CUDA is in use, which a fork cannot share; nor, in builds of torch for CUDA, once this process has run a
    backward, whose threads a fork does not have. The latter is tried.
    """
    if not hasattr(os, "fork") or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        return run_apart(_differentiates)
    except ApartError:
        return False


def run_apart(function: Callable[[], _Result], *, timeout: float = _TIMEOUT_SECONDS) -> _Result:
    """What `function` returns in a fork of this process, which prints nothing and is then gone.

    The other ranks are not there for it: collectives of the fork return at once.

    Args:
        function: without arguments; its result is pickled.
        timeout: seconds.

    Raises:
        PlanError: as `function` raises it.
        ApartError: `function` raised something else, or the fork was killed or said nothing for `timeout`.
    """
    reader, writer = multiprocessing.connection.Pipe(duplex=False)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that are not there in the fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _serve(function, writer)
    writer.close()
    answer, ended = None, False
    try:
        answer = pickle.loads(reader.recv_bytes()) if reader.poll(timeout) else None
        ended = answer is not None
    except EOFError:
        ended = True
    finally:
        reader.close()
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if answer is None:
        how = describe_exit(os.waitstatus_to_exitcode(status)) if ended else f"said nothing for {timeout:.0f} s"
        raise ApartError(how or "ended without a word")
    result, error = answer
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _differentiates() -> bool:
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    return True


def _serve(function: Callable[[], Any], writer: Any) -> NoReturn:
    """Be the fork: answer with a pair of the result and the error, and end."""
    status = 1
    try:
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # for the life of the fork
        sys.stdout = sys.stderr = nowhere
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
        # Threads of OpenMP do not survive a fork; one asks for none.
        torch.set_num_threads(1)
        if dist.is_initialized():
            compat.fake_process_group()
        writer.send_bytes(_answer(function))
        status = 0
    finally:
        # Whatever it was: nothing of this process may run on in the fork.
        os._exit(status)


def _answer(function: Callable[[], Any]) -> bytes:
    """The result of `function` and None, or None and its error, pickled."""
    try:
        return pickle.dumps((function(), None))
    except PlanError as error:
        return pickle.dumps((None, error))
    except BaseException as error:
        # Test runners raise what is no Exception; and whatever it is, this is the end of the fork.
        return pickle.dumps((None, ApartError(f"{type(error).__name__}: {error}")))
