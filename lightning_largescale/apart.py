"""Run a function in a fork of this process, so that whatever it does to the process is not done here.

To trace a step is to run the user's code once more than the user asked for: counters count, streams are read, mocks are
called. In a fork none of that is seen, and a crash ends the fork alone.

A fork has none of the other threads of its process, and of a lock that one held it has a copy that nobody opens. So
there is none where others than those of torch and of tools are known to run, and one that waits is ended.

Source: man page fork(2), Notes; prctl(2), PR_SET_PDEATHSIG; Python's gc.freeze.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.hub import describe_exit

_Result = TypeVar("_Result")
# Of work; a step of the largest models is traced in less.
_TIMEOUT_SECONDS = 300.0
# Without work: it waits, for what a fork does not have or for something that may be waited for here as well.
_IDLE_SECONDS = 5.0
# From when on it is said that there is a fork, and how often it is looked at.
_TOLD_SECONDS, _POLL_SECONDS = 2.0, 0.25
# Of a core: what polls for something that never comes takes less.
_WORKS = 0.2
_PR_SET_PDEATHSIG = 1
# Whose threads nothing in a fork waits for: a progress bar's clock, a kernel's sockets, a logger's queue, our watchers.
_TOOLS = (
    "IPython.",
    "debugpy.",
    "ipykernel.",
    "lightning.",
    "lightning_largescale.",
    "multiprocessing.queues.",
    "multiprocessing.resource_sharer.",
    "rich.",
    "tensorboard.",
    "torch.",
    "tornado.",
    "tqdm.",
    "wandb.",
    "zmq.",
)
# How names begin that threads have which are not Python's: torch's, an allocator's, a notebook's sockets', those of a
# process without a title.
_TOOLS_THREADS = ("pt_", "gloo_", "cuda", "jemalloc", "python", "ZMQbg")


class ApartError(RuntimeError):
    """The fork ended without a result."""


class StuckError(ApartError):
    """The fork waited, for what may be there in this process."""


def can_run_apart() -> bool:
    """Whether a fork can do what this process can.

    Not where CUDA is in use, which a fork cannot share, nor where others' threads run; nor where forks cannot run a
    backward.
    """
    if not hasattr(os, "fork") or torch.cuda.is_initialized() or others_threads():  # type: ignore[no-untyped-call]
        return False
    return forks_differentiate()


def forks_differentiate() -> bool:
    """Whether a fork of this process can run a backward.

    Not where there are CUDA devices and this process has run one, on the CPU too: autograd has a thread for each device
    then, which a fork does not have. It is tried.
    """
    if torch.cuda.device_count() == 0:
        return True
    try:
        return run_apart(_differentiates)
    except ApartError:
        return False


def others_threads() -> list[str]:
    """Names of the threads of this process that are none of torch's, of tools' or ours.

    Libraries' own are told by their names, where the system tells these; one that has the name of the process is taken
    for one that computes (OpenMP's).
    """
    ours = {threading.main_thread(), threading.current_thread()}
    every = threading.enumerate()
    found = [thread.name for thread in every if thread not in ours and not _is_tools(thread)]
    known = {thread.native_id for thread in every}
    names = {int(path.name): _thread_name(path) for path in Path("/proc/self/task").glob("*")}
    own = names.get(os.getpid(), "")
    return found + [
        name
        for number, name in names.items()
        if number not in known and name not in ("", own) and not name.startswith(_TOOLS_THREADS)
    ]


def run_apart(
    function: Callable[[], _Result],
    *,
    timeout: float = _TIMEOUT_SECONDS,
    idle: float = _IDLE_SECONDS,
    what: str = "a batch and the step are looked at",
) -> _Result:
    """What `function` returns in a fork of this process, which prints nothing and is then gone.

    The other ranks are not there for it: collectives of the fork return at once. It ends when this process does, and
    collects no garbage of this process.

    Args:
        function: without arguments; its result is pickled.
        timeout: seconds that it may work.
        idle: seconds that it, and what it starts, may wait.
        what: is done there, as those who wait for it are told.

    Raises:
        PlanError: as `function` raises it.
        StuckError: the fork waited for `idle`.
        ApartError: `function` raised something else, or the fork was killed or worked for more than `timeout`.
    """
    reader, writer = multiprocessing.connection.Pipe(duplex=False)
    parent = os.getpid()
    with warnings.catch_warnings(), no_collection():
        # Python 3.12 warns of threads that are not there in the fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            _serve(function, writer, parent)
    writer.close()
    answer, ended = None, False
    try:
        _wait(reader, child, timeout=timeout, idle=idle, what=what)
        answer = pickle.loads(reader.recv_bytes())
        ended = True
    except EOFError:
        ended = True
    finally:
        reader.close()
        if not ended:
            _end(child)
        _, status = os.waitpid(child, 0)
    if answer is None:
        raise ApartError(describe_exit(os.waitstatus_to_exitcode(status)) or "ended without a word")
    result, error = answer
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Within, no garbage is collected: for a fork, which has to freeze what it finds before it may collect any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_tools(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    modules = (type(thread).__module__, getattr(target, "__module__", None) or "")
    # A pool's threads run what is given them: ours are known by their names.
    return thread.name.startswith(("Dummy-", "lightning_largescale")) or any(
        f"{one}.".startswith(_TOOLS) for one in modules
    )


def _thread_name(folder: Path) -> str:
    try:
        return (folder / "comm").read_text().strip()
    except OSError:
        # It is gone.
        return ""


def _wait(reader: Any, child: int, *, timeout: float, idle: float, what: str) -> None:
    """Until there is something to read.

    Raises:
        StuckError: the fork waited for `idle` seconds.
        ApartError: it worked for `timeout`.
    """
    began = busy = time.monotonic()
    used, told = 0.0, False
    while not reader.poll(min(_POLL_SECONDS, idle)):
        now = time.monotonic()
        before, (used, runs) = used, _work(child)
        if runs or used - before > _WORKS * _POLL_SECONDS:
            busy = now
        if now - busy > idle:
            raise StuckError(f"waited for {idle:.0f} s, for a thread, a lock or data")
        if now - began > timeout:
            raise ApartError(f"said nothing for {timeout:.0f} s")
        if not told and now - began > _TOLD_SECONDS:
            told = True
            rank_zero_info(
                f"lightning_largescale: {what} in a fork of this process, which is ended"
                f" after {idle:.0f} s in which it only waits, or {timeout:.0f} s of work."
            )


def _work(child: int) -> tuple[float, bool]:
    """Seconds that the fork and what it has started have computed, and whether one of them computes or reads now."""
    used, runs = 0.0, False
    for process in _family(child):
        # It may be gone by now.
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
            runs |= process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return used, runs


def _family(child: int) -> list[psutil.Process]:
    try:
        fork = psutil.Process(child)
        return [fork, *fork.children(recursive=True)]
    except psutil.Error:
        return []


def _end(child: int) -> None:
    """Kill the fork, and what it has started: workers of a loader."""
    for process in _family(child):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _differentiates() -> bool:
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    return True


def _serve(function: Callable[[], Any], writer: Any, parent: int) -> NoReturn:
    """Be the fork: answer with a pair of the result and the error, and end."""
    status = 1
    try:
        # What is garbage here is the parent's to collect: the end of a process group waits for its threads.
        gc.freeze()
        _end_with(parent)
        _silence(writer.fileno())
        # Threads of OpenMP do not survive a fork; one asks for none.
        torch.set_num_threads(1)
        if dist.is_initialized():
            compat.fake_process_group()
        writer.send_bytes(_answer(function))
        status = 0
    finally:
        # Whatever it was: nothing of this process may run on in the fork.
        os._exit(status)


def _end_with(parent: int) -> None:
    """Let the fork end when its parent does, whatever it waits for then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _silence(kept: int) -> None:
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # for the life of the fork
    streams = (sys.__stdout__, sys.__stderr__)
    sys.stdout = sys.stderr = nowhere
    for number, stream in enumerate(streams, 1):
        # Where a stream was closed before Python began, its number is that of another file.
        if stream is not None and not stream.closed and number != kept:
            os.dup2(nowhere.fileno(), number)


def _answer(function: Callable[[], Any]) -> bytes:
    """The result of `function` and None, or None and its error, pickled."""
    try:
        return pickle.dumps((function(), None))
    except PlanError as error:
        return pickle.dumps((None, error))
    except BaseException as error:
        # Test runners raise what is no Exception; and whatever it is, this is the end of the fork.
        return pickle.dumps((None, ApartError(f"{type(error).__name__}: {error}")))
