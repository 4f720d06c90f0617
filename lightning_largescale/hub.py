"""The hub: a thread in rank 0's process that detects which rank failed first, and notifies every other.

A rank that raises reports its error before its connections close; a rank that is killed is detected by the end of its
connection. torch's TCPStore could carry the same messages, but prints a C++ stack trace in every rank when rank 0 ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lightning_largescale.waiting import STILL_SECONDS, Place, Wait, has_gone_on, sentence_of

# Seconds for every rank to report an error of its own before the first is taken for the only one. Wrong input raises
# on all ranks; then no rank waits for another, and connections can stay.
TOGETHER_SECONDS = 2.0
# Seconds to wait for the cause of a lost connection: the peer's own error, or its end, which may come a moment later.
_REASON_SECONDS = 0.5
_POLL_SECONDS = 0.2
# Seconds for which a report that a rank waits is valid: a rank that holds the interpreter's lock, or is suspended,
# cannot report that it no longer waits. Less than STILL_SECONDS, so that all ranks waited at one time.
_WAIT_HOLDS_SECONDS = STILL_SECONDS / 2

LOST = "ended without an error of its own; where the system killed it, running out of memory is the usual cause"

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_fork() -> None:
    """Close the parent's sockets in a forked child: a DataLoader worker would keep those of a killed rank open."""
    for held in list(_sockets):
        held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The failure of a rank.

    Attributes:
        rank: the global rank that failed.
        what: its error as one line, or how it ended.
        lost: whether it has no error of its own: its connection to another rank broke, or its process ended.
        trace: its traceback as Python prints it; empty if there is none.
        stuck: whether it waits in a collective that the others never enter, and will raise nothing by itself.
    """

    rank: int
    what: str
    lost: bool = False
    trace: str = ""
    stuck: bool = False

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe `error`, raised on global rank `rank`."""
        what = traceback.format_exception_only(type(error), error)[-1].strip()
        return cls(
            rank=rank, what=what, lost=is_connection_loss(error), trace="".join(traceback.format_exception(error))
        )

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}" if self.lost else f"rank {self.rank} failed first, with {self.what}"


def describe_exit(code: int | None) -> str | None:
    """Return the meaning of a process's exit status, to follow "rank 1"; None without a status or for 0."""
    if not code:
        return None
    if code > 0:
        return f"ended with exit status {code}; its own error is above"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    cause = "; running out of memory is the usual cause" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){cause}"


def is_connection_loss(error: BaseException) -> bool:
    """Return whether `error` is one that torch's backends raise when a peer is gone."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    # gloo raises a bare RuntimeError with the place in its transport and the system's words.
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


class Lines:
    """JSON objects over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        _sockets.add(connection)

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`; ignore a peer that is gone, since reading the connection detects its end."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End the connection; also wakes the thread that reads it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[dict[str, Any]] | None:
        """Return the messages that have come, waiting for bytes once; None at the end of the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


@dataclasses.dataclass
class _RankState:
    lines: Lines
    rank: int | None = None
    finished: bool = False
    waits: Wait | None = None
    heard: float = 0.0
    passed: Place = ()
    told: Place = ()


class Hub(threading.Thread):
    """Server of all ranks, in rank 0's process. It ends when every rank has finished or disconnected.

    Args:
        address: the host name by which other ranks reach this process.
        world_size: the number of ranks.
        describe_exit: returns how the process of a rank ended, in words that follow "rank 1"; None if unknown.
    """

    def __init__(self, address: str, world_size: int, describe_exit: Callable[[int], str | None]) -> None:
        super().__init__(daemon=True, name="largescale-hub")
        self._world_size = world_size
        self._describe_exit = describe_exit
        local = address in ("127.0.0.1", "localhost")
        self._server = socket.create_server(("127.0.0.1" if local else "", 0))
        _sockets.add(self._server)
        # The token distinguishes the ranks from strangers on the network and from ranks of an earlier run.
        self._token = secrets.token_hex(16)
        self.endpoint = (address, self._server.getsockname()[1], self._token)
        self._members: dict[socket.socket, _RankState] = {}
        self._selector = selectors.DefaultSelector()
        self._first: Failure | None = None
        self._loss: tuple[float, Failure] | None = None
        self._known: set[int] = set()
        self._failed: set[int] = set()
        self._verdict_due: float | None = None

    def run(self) -> None:
        """Listen until every rank has connected and disconnected."""
        self._selector.register(self._server, selectors.EVENT_READ)
        gone = 0
        while gone < self._world_size:
            for key, _ in self._selector.select(_POLL_SECONDS):
                if key.fileobj is self._server:
                    connection, _ = self._server.accept()
                    self._members[connection] = _RankState(Lines(connection))
                    self._selector.register(connection, selectors.EVENT_READ)
                else:
                    gone += self._read(self._members[key.fileobj])  # type: ignore[index]
            self._end_left()
            self._end_stuck(time.monotonic())
            self._decide(time.monotonic())
        # Connections that never identified themselves are still open.
        for member in self._members.values():
            member.lines.socket.close()
        self._selector.close()
        self._server.close()

    def _read(self, member: _RankState) -> bool:
        """Handle the messages of `member`; return whether it is gone."""
        messages = member.lines.receive()
        if messages is None:
            self._selector.unregister(member.lines.socket)
            del self._members[member.lines.socket]
            member.lines.socket.close()
            if member.rank is not None and not member.finished and member.rank not in self._failed:
                self._lose(Failure(rank=member.rank, what=LOST, lost=True), replace=True)
            return member.rank is not None
        for message in messages:
            self._take(member, message)
        return False

    def _take(self, member: _RankState, message: dict[str, Any]) -> None:
        member.passed, member.told = message.get("passed", member.passed), message.get("told", member.told)
        if member.rank is None:
            if message.get("token") == self._token:
                member.rank = message["rank"]
                self._known.add(message["rank"])
                if self._first is not None:
                    member.lines.send({"first": dataclasses.asdict(self._first)})
        elif "failed" in message:
            failure = Failure(**message["failed"])
            if failure.lost:
                self._lose(failure, replace=False)
            else:
                self._failed.add(failure.rank)
                self._announce(failure)
        elif "waits" in message:
            member.waits, member.heard = message["waits"] and Wait.of(message["waits"]), time.monotonic()
            self._ask(member.waits)
        elif "finished" in message:
            member.finished = True
            if member.rank == 0:
                self._tell({"finished": True})

    def _ask(self, wait: Wait | None) -> None:
        """Ask the ranks that `wait` is for about their progress."""
        for member in self._members.values():
            if wait is not None and wait.awaited is not None and member.rank in wait.awaited.ranks:
                member.lines.send({"passed": None})

    def _end_left(self) -> None:
        """End the run if a rank is past the position where another waits for it."""
        for member in self._members.values():
            awaited = member.waits and member.waits.awaited
            if member.rank is None or not awaited:
                continue
            others = [other for other in self._members.values() if other.rank in awaited.ranks]
            if any(has_gone_on(awaited, other.passed, other.told) for other in others):
                self._announce(Failure(rank=member.rank, what=f"PlanError: {awaited.otherwise}", stuck=True))

    def _end_stuck(self, now: float) -> None:
        """End the run if every rank that has not finished waits for ranks that do not come."""
        here = {member.rank: member for member in self._members.values() if member.rank is not None}
        at_work = {
            rank: member.waits if now - member.heard < _WAIT_HOLDS_SECONDS else None
            for rank, member in here.items()
            if not member.finished
        }
        found = sentence_of(at_work, finished=len(at_work) < self._world_size)
        if found is not None and len(self._known) == self._world_size:
            self._announce(Failure(rank=found[0], what=found[1], stuck=True))

    def _lose(self, failure: Failure, *, replace: bool) -> None:
        if self._loss is None:
            self._loss = (time.monotonic() + _REASON_SECONDS, failure)
        elif replace:
            self._loss = (self._loss[0], failure)

    def _announce(self, failure: Failure) -> None:
        if self._first is None:
            self._first = failure
            self._verdict_due = time.monotonic() + (0 if failure.lost else TOGETHER_SECONDS)
            self._tell({"first": dataclasses.asdict(failure)})

    def _decide(self, now: float) -> None:
        if self._loss is not None and self._first is None and now >= self._loss[0]:
            failure = self._loss[1]
            self._announce(dataclasses.replace(failure, what=self._describe_exit(failure.rank) or failure.what))
        together = len(self._failed) == self._world_size
        if self._verdict_due is not None and (together or now >= self._verdict_due):
            self._verdict_due = None
            self._tell({"together": together})

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members.values():
            member.lines.send(message)
