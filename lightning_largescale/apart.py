"""Run a function in a fork of this process, which isolates its side effects.

Tracing a step runs the user's code once more than the user asked for: counters count, streams are read, mocks are
called. In a fork none of these effects reach this process, and a crash ends only the fork.

A fork has none of the other threads of its process, and a lock that such a thread held stays locked in it. So no fork
is made if threads other than torch's and known tools' run, and a fork that waits is killed.

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
# Seconds of work; tracing a step of the largest models takes less.
_TIMEOUT_SECONDS = 300.0
# Seconds without work: the fork waits for something that it lacks, or that this process may wait for as well.
_IDLE_SECONDS = 5.0
# Seconds until the user is told of the fork, and the interval at which the fork is polled.
_TOLD_SECONDS, _POLL_SECONDS = 2.0, 0.25
# The fraction of a core that counts as work: polling for something that never comes takes less.
_WORKS = 0.2
_PR_SET_PDEATHSIG = 1
# Modules whose threads no code in a fork waits for: a progress bar's clock, a kernel's sockets, a logger's queue, our
# watchers.
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
# Name prefixes of threads that Python did not start: those of torch, an allocator, a notebook's sockets, a process
# without a title.
_TOOLS_THREADS = ("pt_", "gloo_", "cuda", "jemalloc", "python", "ZMQbg")


class ApartError(RuntimeError):
    """The fork ended without a result."""


class StuckError(ApartError):
    """The fork waited for something that this process may have."""


def can_run_apart() -> bool:
    """Return whether a fork can do what this process can.

    It cannot if CUDA is initialized, which a fork cannot share, if threads of other libraries run, or if a fork cannot
    run a backward.
    """
    if not hasattr(os, "fork") or torch.cuda.is_initialized() or others_threads():  # type: ignore[no-untyped-call]
        return False
    return forks_differentiate()


def forks_differentiate() -> bool:
    """Return whether a fork of this process can run a backward; tries one if there are CUDA devices.

    It cannot if there are CUDA devices and this process has run a backward, even on the CPU: autograd then has a thread
    per device, which the fork lacks.
    """
    if torch.cuda.device_count() == 0:
        return True
    try:
        return run_apart(_differentiates)
    except ApartError:
        return False


def others_threads() -> list[str]:
    """Return the names of the threads of this process that belong neither to torch, nor to tools, nor to this package.

    Threads that Python did not start are recognized by their names, if the system has these; a thread with the name of
    the process counts as a compute thread (OpenMP's).
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
    """Run `function` in a fork of this process, which prints nothing, and return its result.

    Collectives of the fork return at once, without the other ranks. The fork ends when this process does, and collects
    no garbage of this process.

    Args:
        function: a function without arguments; its result is pickled.
        timeout: seconds that the fork may work.
        idle: seconds that the fork, and the processes that it starts, may wait.
        what: the work of the fork, in the words of the log line.

    Raises:
        PlanError: `function` raised it.
        StuckError: the fork waited for `idle`.
        ApartError: `function` raised something else, or the fork was killed or worked for more than `timeout`.
    """
    reader, writer = multiprocessing.connection.Pipe(duplex=False)
    parent = os.getpid()
    with warnings.catch_warnings(), no_collection():
        # Python 3.12 warns that the fork lacks the other threads.
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
    """Context without garbage collection: a fork has to freeze the objects that it inherits before it collects any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_tools(thread: threading.Thread) -> bool:
    target = compat.target_of(thread)
    modules = (type(thread).__module__, getattr(target, "__module__", None) or "")
    # The threads of a pool run any function: this package's are recognized by their names.
    return thread.name.startswith(("Dummy-", "lightning_largescale")) or any(
        f"{one}.".startswith(_TOOLS) for one in modules
    )


def _thread_name(folder: Path) -> str:
    try:
        return (folder / "comm").read_text().strip()
    except OSError:
        # The thread has ended.
        return ""


def _wait(reader: Any, child: int, *, timeout: float, idle: float, what: str) -> None:
    """Wait until `reader` has data.

    Raises:
        StuckError: the fork waited for `idle` seconds.
        ApartError: the fork worked for `timeout` seconds.
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
    """Return the CPU seconds of the fork and its descendants, and whether one of them runs or reads a disk now."""
    used, runs = 0.0, False
    for process in _family(child):
        # The process may have ended.
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
    """Kill the fork and its descendants, such as the workers of a loader."""
    for process in _family(child):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _differentiates() -> bool:
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    return True


def _serve(function: Callable[[], Any], writer: Any, parent: int) -> NoReturn:
    """Main function of the fork: send the result and the error as a pair, and exit."""
    status = 1
    try:
        # Inherited garbage must not be collected here: destroying a process group waits for its threads.
        gc.freeze()
        _end_with(parent)
        _silence(writer.fileno())
        # OpenMP's threads do not survive a fork; a computation with one thread asks for no others.
        torch.set_num_threads(1)
        if dist.is_initialized():
            compat.fake_process_group()
        writer.send_bytes(_answer(function))
        status = 0
    finally:
        # After any exception: no code of the parent may run on in the fork.
        os._exit(status)


def _end_with(parent: int) -> None:
    """Make the fork end when its parent does, even while it waits."""
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
        # If a stream was closed before Python started, its number belongs to another file.
        if stream is not None and not stream.closed and number != kept:
            os.dup2(nowhere.fileno(), number)


def _answer(function: Callable[[], Any]) -> bytes:
    """Return, pickled, the result of `function` and None, or None and its error."""
    try:
        return pickle.dumps((function(), None))
    except PlanError as error:
        return pickle.dumps((None, error))
    except BaseException as error:
        # Test runners raise exceptions that do not derive from Exception; the fork ends after any of them.
        return pickle.dumps((None, ApartError(f"{type(error).__name__}: {error}")))
