"""What a rank waits for, as others see it: its thread's stack, once it has stood still in a collective for seconds.

A rank that alone reads a sharded parameter waits in a collective that the others never enter, and they wait in the next
of theirs. Each can tell that it waits and where; the hub can tell that all do, and not for the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch

from lightning_largescale import compat

# Seconds that a thread stands still before it is taken to wait: no work of the processor, at one place of its code.
STILL_SECONDS = 4.0
_TORCH, _LIGHTNING, _OURS = (
    str(Path(found).parent) + "/" for found in (torch.__file__, str(lightning.__file__), __file__)
)
_READS, _AGREES = f"{_OURS}parallel/full_reads.py", f"{_OURS}parallel/agreement.py"
# More than waiting costs, less than any work.
_STILL_CPU_SECONDS = 0.01


# Where a rank is in steps whose modules ranks compare: numbers of what compares them, of its step, of modules entered.
Place = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """Ranks that are to tell which module they run next.

    Attributes:
        place: of the rank that asks them, which is the same on all of them.
        ranks: these, and the one that asks.
        otherwise: why the run ends where one of them has gone on without a word.
    """

    place: Place
    ranks: Sequence[int]
    otherwise: str


class Progress:
    """How far this process has come in steps whose modules ranks compare, for threads that answer for it.

    Attributes:
        passed: where it has come to.
        told: where it last told the others which module it runs next, or is about to.
        awaited: of whom it is to hear now.
    """

    def __init__(self) -> None:
        self.passed: Place = ()
        self.told: Place = ()
        self.awaited: Awaited | None = None
        self._begun = 0

    def begin(self) -> int:
        """A number, the same on all ranks, of what compares modules from now on."""
        self._begun += 1
        return self._begun

    @contextlib.contextmanager
    def asking(self, awaited: Awaited) -> Iterator[None]:
        """Within, this rank waits for others to tell, and has told."""
        # Before the others can hear of it: whoever reads `passed` and then this sees no rank go on without a word.
        self.told, self.awaited = awaited.place, awaited
        try:
            yield
        finally:
            self.awaited = None

    def answer(self) -> dict[str, Place]:
        """What `has_gone_on` is to know of this rank."""
        passed = self.passed
        return {"passed": passed, "told": self.told}


PROGRESS = Progress()


def has_gone_on(awaited: Awaited, passed: Place, told: Place) -> bool:
    """Whether a rank is past the place where another waits for it, and has not told there what it runs."""
    place, passed, told = tuple(awaited.place), tuple(passed), tuple(told)
    return passed[:1] == place[:1] and passed > place > told


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """Where a rank waits.

    Attributes:
        place: the line of the user's code, or that of the innermost code there is.
        read: the function that reads a sharded tensor there; empty where the collective is another.
        hook: of Lightning's, that the line is in; empty where it is in none.
        agrees: the other ranks are to tell there what they are about to run, gather or reduce.
        gathers: the collective is FSDP's, which all ranks are to enter.
        awaited: ranks that are to tell there which module they run next; None where it asks for no such thing.
    """

    place: str
    read: str = ""
    hook: str = ""
    agrees: bool = False
    gathers: bool = False
    awaited: Awaited | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Wait:
        """The one whose fields `dataclasses.asdict` gave, and JSON carried."""
        awaited = fields.get("awaited")
        return cls(**{**fields, "awaited": awaited and Awaited(**awaited)})


class Waiting:
    """Tells whether a thread waits in a collective, asked again and again.

    Args:
        thread: the one to look at.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._clock = _clock_of(thread)
        self._since = 0.0
        self._cpu = 0.0
        self._key: tuple[tuple[int, int], ...] = ()

    def look(self, now: float) -> Wait | None:
        """Where it waits; None while it works, or has not waited for STILL_SECONDS."""
        frame = compat.frame_of(self._thread)
        if frame is None or self._clock is None:
            return None
        frames = [one for one, _ in traceback.walk_stack(frame)]
        key = tuple((id(one.f_code), one.f_lasti) for one in frames)
        try:
            cpu = time.clock_gettime(self._clock)
        except OSError:
            # It has ended since.
            return None
        still = key == self._key and cpu - self._cpu < _STILL_CPU_SECONDS and self._sleeps()
        if not still or not compat.calls_collective(frames[0]):
            self._key, self._cpu, self._since = key, cpu, now
            return None
        return _describe(frames) if now - self._since >= STILL_SECONDS else None

    def _sleeps(self) -> bool:
        """Whether it does not even want the processor, which others may have; True where the system does not say."""
        try:
            stat = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] == "S"


def sentence_of(waits: Mapping[int, Wait | None], *, finished: bool) -> tuple[int, str] | None:
    """The rank that waits for what the others do not come to, and why the run ends; None unless every rank waits, and
    not for the same.

    Args:
        waits: of each rank that has not finished; None for one that does not wait.
        finished: whether there are others, which have.
    """
    found = {rank: wait for rank, wait in waits.items() if wait is not None}
    if len(found) < len(waits):
        return None
    reading = [rank for rank, wait in found.items() if wait.read]
    if not reading:
        return _not_agreed(found, finished=finished)
    rank, wait = reading[0], found[reading[0]]
    others = {other: where for other, where in found.items() if where != wait}
    if not others and not finished:
        return None
    hook = f" in {wait.hook}" if wait.hook else ""
    elsewhere = "".join(f", and rank {other} is at {where.place}" for other, where in [*others.items()][:1])
    return rank, (
        f"PlanError: rank {rank} reads a sharded tensor ({wait.read}) at {wait.place}{hook}, which every rank has to"
        f" do{elsewhere}; read parameters and gradients on all ranks, or this rank's shard by their to_local()."
    )


def _not_agreed(found: Mapping[int, Wait], *, finished: bool) -> tuple[int, str] | None:
    """A rank that waits for what the others are to gather too, and one that is in a collective of its own, or has
    finished.
    """
    agreeing = [rank for rank, wait in found.items() if wait.agrees]
    agreeing += [rank for rank, wait in found.items() if wait.gathers]
    alone = [rank for rank, wait in found.items() if not wait.agrees and not wait.gathers]
    if agreeing and not alone and finished:
        return agreeing[0], (
            f"PlanError: rank {agreeing[0]} runs a block at {found[agreeing[0]].place}, which all ranks are to gather,"
            " and another rank has ended its part of the run; outside of steps let all ranks run the same blocks, or"
            " use trainer.strategy.full_parameters() on all of them."
        )
    if not agreeing or not alone:
        return None
    wait = found[agreeing[0]]
    awaited = "to tell which blocks it runs, since the ranks run different ones" if wait.agrees else "to gather a block"
    return alone[0], (
        f"PlanError: rank {alone[0]} is in a collective at {found[alone[0]].place}, and rank {agreeing[0]} waits at"
        f" {wait.place} for it {awaited}; call"
        " self.all_gather, self.log(sync_dist=True) or self.trainer.strategy.reduce in place of torch.distributed, or"
        " let all ranks run the same blocks."
    )


def _clock_of(thread: threading.Thread) -> int | None:
    """That of the processor time of `thread`; None where the system has none, and of a thread that has ended."""
    if not hasattr(time, "pthread_getcpuclockid") or not thread.ident or not thread.is_alive():
        return None
    try:
        return time.pthread_getcpuclockid(thread.ident)
    except OSError:
        return None


def _describe(frames: list[FrameType]) -> Wait:
    """Where the user's code is in a stack, the innermost frame first."""
    reads = [index for index, one in enumerate(frames) if one.f_code.co_filename == _READS]
    outer = frames[reads[-1] + 1 :] if reads else frames
    user = next(filter(_is_users, outer), outer[0])
    names = [one.f_locals.get("hook_name") for one in outer if one.f_code.co_filename.startswith(_LIGHTNING)]
    function = frames[reads[-1]].f_locals.get("func") if reads else None
    if str(getattr(function, "__module__", "")).startswith("torch.distributed") or _name(function) == "backward":
        # Passes through what looks for reads, and is a collective of the user's, or runs what is not reading.
        function = None
    awaited = PROGRESS.awaited
    place = f"{user.f_code.co_filename}:{user.f_lineno} ({_function_of(user).f_code.co_name})"
    hook = next((name for name in names if isinstance(name, str)), "")
    return Wait(
        place=place,
        read="" if function is None else _name(function),
        hook=hook,
        agrees=awaited is not None or frames[0].f_code.co_filename == _AGREES,
        gathers=any(map(compat.is_of_group, itertools.takewhile(lambda one: not _is_users(one), frames))),
        awaited=awaited,
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def _function_of(frame: FrameType) -> FrameType:
    """The frame of the function that a comprehension, a generator expression or a lambda is written in."""
    filename, within = frame.f_code.co_filename, frame
    while within.f_code.co_name.startswith("<"):
        outer = within.f_back
        if outer is None or outer.f_code.co_filename != filename:
            return frame
        within = outer
    return within


def _is_users(frame: FrameType) -> bool:
    filename = frame.f_code.co_filename
    return not filename.startswith((_TORCH, _LIGHTNING, _OURS, "<")) and "/lib/python" not in filename
