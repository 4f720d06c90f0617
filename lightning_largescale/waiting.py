"""Detection of ranks that wait in different collectives, from the stack of a thread that has not moved for seconds.

A rank that reads a sharded parameter alone waits in a collective that the other ranks never enter, and they wait in
their next collective. Each rank reports that it waits and where; the hub detects that all ranks wait, and not for the
same collective.
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

# Seconds without CPU work, at one place of its code, after which a thread counts as waiting.
STILL_SECONDS = 4.0
_TORCH, _LIGHTNING, _OURS = (
    str(Path(found).parent) + "/" for found in (torch.__file__, str(lightning.__file__), __file__)
)
_READS, _AGREES = f"{_OURS}parallel/full_reads.py", f"{_OURS}parallel/agreement.py"
# CPU seconds between two looks: more than waiting costs, less than any work.
_STILL_CPU_SECONDS = 0.01


# The position of a rank in steps whose modules ranks compare: numbers of the comparison, of its step, of the modules
# entered.
Place = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """The ranks that have to report which module they run next, and the rank that asks them.

    Attributes:
        place: the position of the asking rank, the same on all these ranks.
        ranks: the ranks that are asked, and the one that asks.
        otherwise: why the run ends if one of them has gone on without reporting.
    """

    place: Place
    ranks: Sequence[int]
    otherwise: str


class Progress:
    """Progress of this process in steps whose modules ranks compare; other threads read it to answer the hub.

    Attributes:
        passed: the position that this process has reached.
        told: the position where it last reported, or is about to report, which module it runs next.
        awaited: the ranks whose report it waits for now; None if it waits for none.
    """

    def __init__(self) -> None:
        self.passed: Place = ()
        self.told: Place = ()
        self.awaited: Awaited | None = None
        self._begun = 0

    def begin(self) -> int:
        """Return a number, the same on all ranks, for the comparison of modules that begins now."""
        self._begun += 1
        return self._begun

    @contextlib.contextmanager
    def asking(self, awaited: Awaited) -> Iterator[None]:
        """Context in which this rank has reported and waits for the reports of `awaited`."""
        # Set before the other ranks can receive the report: a reader of `passed` and then of `told` never sees a rank
        # that has gone on without reporting.
        self.told, self.awaited = awaited.place, awaited
        try:
            yield
        finally:
            self.awaited = None

    def answer(self) -> dict[str, Place]:
        """Return the positions of this rank that `has_gone_on` takes."""
        passed = self.passed
        return {"passed": passed, "told": self.told}


PROGRESS = Progress()


def has_gone_on(awaited: Awaited, passed: Place, told: Place) -> bool:
    """Return whether a rank is past the position where another waits for it, and has not reported there.

    Args:
        awaited: the position where the other rank waits.
        passed: the position that the rank has reached.
        told: the position where the rank last reported.
    """
    place, passed, told = tuple(awaited.place), tuple(passed), tuple(told)
    return passed[:1] == place[:1] and passed > place > told


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """The place where a rank waits, and the kind of its collective.

    Attributes:
        place: the line of the user's code, or of the innermost frame if none is the user's.
        read: the function that reads a sharded tensor there; empty for another collective.
        hook: the Lightning hook that contains the line; empty if none does.
        agrees: whether the rank waits for the other ranks to report what they are about to run, gather or reduce.
        gathers: whether the collective is FSDP's, which all ranks have to enter.
        awaited: the ranks that have to report there which module they run next; None if the rank asks for no report.
    """

    place: str
    read: str = ""
    hook: str = ""
    agrees: bool = False
    gathers: bool = False
    awaited: Awaited | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Wait:
        """Rebuild a `Wait` from the fields of `dataclasses.asdict` after a round trip through JSON."""
        awaited = fields.get("awaited")
        return cls(**{**fields, "awaited": awaited and Awaited(**awaited)})


class Waiting:
    """Detector of a thread that waits in a collective; call `look` repeatedly.

    Args:
        thread: the thread to look at.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._clock = _clock_of(thread)
        self._since = 0.0
        self._cpu = 0.0
        self._key: tuple[tuple[int, int], ...] = ()

    def look(self, now: float) -> Wait | None:
        """Return where the thread waits; None while it works, or has not waited for STILL_SECONDS.

        Args:
            now: seconds of `time.monotonic`.
        """
        frame = compat.frame_of(self._thread)
        if frame is None or self._clock is None:
            return None
        frames = [one for one, _ in traceback.walk_stack(frame)]
        key = tuple((id(one.f_code), one.f_lasti) for one in frames)
        try:
            cpu = time.clock_gettime(self._clock)
        except OSError:
            # The thread has ended since.
            return None
        still = key == self._key and cpu - self._cpu < _STILL_CPU_SECONDS and self._sleeps()
        if not still or not compat.calls_collective(frames[0]):
            self._key, self._cpu, self._since = key, cpu, now
            return None
        return _describe(frames) if now - self._since >= STILL_SECONDS else None

    def _sleeps(self) -> bool:
        """Return whether the thread sleeps, rather than being ready to run; True if the system cannot tell."""
        try:
            stat = Path(f"/proc/self/task/{self._thread.native_id}/stat").read_text()
        except OSError:
            return True
        return stat.rpartition(")")[2].split()[0] == "S"


def sentence_of(waits: Mapping[int, Wait | None], *, finished: bool) -> tuple[int, str] | None:
    """Return the rank that waits for the others in vain, and the error message; None unless all ranks wait, and for
    different collectives.

    Args:
        waits: the wait of each rank that has not finished; None for a rank that does not wait.
        finished: whether other ranks have finished.
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
    """Return a rank and the error message if some ranks wait for all to agree or to gather, and others are in another
    collective or have finished; else None.
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
    """Return the CPU-time clock of `thread`; None if the system has no such clock or the thread has ended."""
    if not hasattr(time, "pthread_getcpuclockid") or not thread.ident or not thread.is_alive():
        return None
    try:
        return time.pthread_getcpuclockid(thread.ident)
    except OSError:
        return None


def _describe(frames: list[FrameType]) -> Wait:
    """Describe the wait of a thread from its stack, the innermost frame first."""
    reads = [index for index, one in enumerate(frames) if one.f_code.co_filename == _READS]
    outer = frames[reads[-1] + 1 :] if reads else frames
    user = next(filter(_is_users, outer), outer[0])
    names = [one.f_locals.get("hook_name") for one in outer if one.f_code.co_filename.startswith(_LIGHTNING)]
    function = frames[reads[-1]].f_locals.get("func") if reads else None
    if str(getattr(function, "__module__", "")).startswith("torch.distributed") or _name(function) == "backward":
        # The dispatch in full_reads.py sees these functions too, but they do not read a sharded tensor: a collective of
        # the user's, or a backward.
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
    """Return the frame of the function that contains a comprehension, a generator expression or a lambda."""
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
