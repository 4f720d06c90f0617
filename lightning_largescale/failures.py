"""Failures told across ranks: whoever fails first is shown, everyone else ends soon and says little.

Every rank keeps a connection to the hub in rank 0's process and tells it of its error before its other connections
close, so that the hub knows which came first. A watcher thread in each rank hears of a failure and ends the process if
the main thread is stuck where no exception reaches it, as in a collective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from lightning_largescale import compat
from lightning_largescale.console import flush, tell
from lightning_largescale.groups import drop_groups, leave_process_group
from lightning_largescale.hub import LOST, TOGETHER_SECONDS, Failure, Lines
from lightning_largescale.waiting import PROGRESS, Wait, Waiting

# Seconds a rank has, after another failed, to raise by itself before its watcher ends it: enough to see the connection
# close, finish callbacks and loggers; with the times below it stays well under the 15 s in which a run must have ended.
GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.2
_WAIT_POLL_SECONDS = 0.5


class PeerFailures:
    """One rank's view of the others while it runs a stage: hears of their failures, tells them of its own.

    Args:
        parent: process id of the launcher that this rank ends with, None where it started by other means.
        before_exit: called before the watcher ends the process, with the failure that it ends for.
    """

    def __init__(self, *, parent: int | None = None, before_exit: Callable[[Failure], None] | None = None) -> None:
        self._parent = parent
        self._before_exit = before_exit
        self.rank = 0
        self._lines: Lines | None = None
        self._first: Failure | None = None
        self._heard = threading.Event()
        self._decided = threading.Event()
        self._together = False
        self._rank_zero_finished = False
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to watch the launcher; `connect` adds the peers."""
        if self._parent is not None:
            threading.Thread(target=self._watch_parent, daemon=True, name="largescale-parent").start()

    def connect(self, rank: int, endpoint: tuple[str, int, str]) -> None:
        """Join the hub at `endpoint` (host, port, token) as global rank `rank`; unreachable, nothing is watched."""
        self.rank = rank
        host, port, token = endpoint
        try:
            connection = socket.create_connection((host, port), timeout=GRACE_SECONDS)
        except OSError:
            # A firewall between nodes: training does not need this connection, only the manners of failing do.
            return
        connection.settimeout(None)
        self._lines = Lines(connection)
        self._lines.send({"rank": rank, "token": token})
        threading.Thread(target=self._listen, args=(self._lines,), daemon=True, name="largescale-peers").start()
        waiting = Waiting(threading.current_thread())
        threading.Thread(target=self._tell_waits, args=(waiting, self._lines), daemon=True).start()

    def finish(self) -> None:
        """This rank's stage is over: its later end is no failure."""
        self._over.set()
        if self._lines is not None:
            self._lines.send({"finished": True})
            self._lines.close()

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank raised `error`, and return once it may be raised further.

        Where another rank failed first, `error` is told in one line if nobody catches it. Unless all ranks are known to
        have failed alike, the process group is left: nobody waits for this rank where the caller catches `error`.
        """
        self._over.set()
        if self._lines is None:
            # Nobody can be told, nor whether all failed alike. Peers may wait for this rank in a group that an earlier
            # stage left, and what handles the error here must not wait for them.
            leave_process_group()
            return
        own = Failure.of(self.rank, error)
        if own.lost:
            # Stands while this waits: torchrun's SIGTERM raises in the midst of it.
            tell_in_one_line(error, f"rank {self.rank} stops: it lost its connection to another rank, which {LOST}")
        try:
            self._lines.send({"failed": dataclasses.asdict(own)})
            self._heard.wait(GRACE_SECONDS)
            first = self._first or own
            self._decided.wait(TOGETHER_SECONDS + 1)
            here = "" if own.lost else f"; here {own.what}"
            # A connection that broke without anybody's failure is a fault of the network, and its traceback is due.
            follows = first.rank != own.rank
            tell_in_one_line(error, f"rank {self.rank} stops: {first}{here}" if follows else None)
        finally:
            if self._together:
                # All ranks stopped, each where it was: what it had begun in a group is met by nothing.
                drop_groups()
            else:
                leave_process_group()
            self._lines.close()

    def _listen(self, lines: Lines) -> None:
        with lines.socket:
            self._hear(lines)

    def _hear(self, lines: Lines) -> None:
        while (messages := lines.receive()) is not None:
            for message in messages:
                self._rank_zero_finished |= "finished" in message
                if "first" in message and self._first is None:
                    self._first = Failure(**message["first"])
                    self._heard.set()
                    if self._first.rank != self.rank or self._first.stuck:
                        threading.Thread(target=self.end_if_stuck, args=(self._first,), daemon=True).start()
                elif "passed" in message:
                    lines.send(PROGRESS.answer())
                elif "together" in message:
                    self._together = message["together"]
                    self._decided.set()
        if not self._rank_zero_finished and self._first is None and not self._over.is_set():
            self._first = Failure(rank=0, what=LOST, lost=True)
            self._heard.set()
            self._decided.set()
            self.end_if_stuck(self._first)

    def _tell_waits(self, waiting: Waiting, lines: Lines) -> None:
        """Tell the hub where this rank waits, as long as it does, and that it does no more."""
        told: Wait | None = None
        while not self._over.wait(_WAIT_POLL_SECONDS):
            wait = waiting.look(time.monotonic())
            if wait is not None or told is not None:
                told = wait
                lines.send({"waits": None if wait is None else dataclasses.asdict(wait), **PROGRESS.answer()})

    def _watch_parent(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            # Once connected, the hub knows more: a rank 0 that finished is no failure of the ranks still at work.
            if os.getppid() != self._parent and self._lines is None:
                self.end_if_stuck(Failure(rank=0, what=LOST, lost=True))
                return

    def end_if_stuck(self, failure: Failure) -> None:
        """End this process for `failure` unless its main thread finishes or reports an error within GRACE_SECONDS."""
        if not self._over.wait(GRACE_SECONDS):
            end_process(f"rank {self.rank} stops: {failure}", lambda: self._before_exit and self._before_exit(failure))


def end_process(line: str, before: Callable[[], object], *, status: int = 1) -> NoReturn:
    """End this process and its child processes, from any thread, whatever its main thread does.

    Args:
        line: The line to print.
        before: A function to call before the line is printed.
        status: The exit status.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    before()
    tell(line)
    flush()
    os._exit(status)


def tell_in_one_line(error: BaseException, line: str | None) -> None:
    """Make `error`, if nobody catches it, end this process with `line`, not its traceback; None takes that back."""
    error.__dict__["_largescale_line"] = line


def told_in_one_line(error: BaseException | None) -> str | None:
    """Return the line that stands for `error` or for what it was raised during, None where its traceback is due."""
    while error is not None:
        if (line := error.__dict__.get("_largescale_line")) is not None:
            return str(line)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def reported(failures: PeerFailures) -> Iterator[None]:
    """Run a stage under `failures`: watched from its start, its exception told to the others before it is handled."""
    with _interrupts(failures):
        failures.start()
        try:
            yield
        except compat.TunerExit:
            failures.finish()
            raise
        except BaseException as error:
            failures.report(error)
            raise
        failures.finish()


@contextlib.contextmanager
def _interrupts(failures: PeerFailures) -> Iterator[None]:
    """Let Ctrl-C end this process also while its main thread is in a collective, which Python's handlers wait for."""
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python's C handler writes the signal's number there at once, whatever the main thread does.
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_read_signals, args=(reader, failures), daemon=True, name="largescale-signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous, warn_on_full_buffer=False)
        os.close(writer)


def _read_signals(reader: int, failures: PeerFailures) -> None:
    with open(reader, "rb", buffering=0) as signals:
        while numbers := signals.read(64):
            if signal.SIGINT in numbers:
                failures.end_if_stuck(Failure(rank=failures.rank, what="was interrupted", lost=True))
                return
