"""The exchange of data-parallel ranks before they enter collectives: one all-reduce of a few numbers on the CPU.

Each number states a fact of one rank. All ranks receive the maximum, so a fact that holds on any rank is known to all.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_largescale.errors import PlanError

# Points where all ranks meet, described by the rank's action there.
POINTS = (
    "begins a training step",
    "begins a step of an evaluation",
    "ends a forward that a backward follows",
    "ends a step",
    "ends a backward",
    "enters a collective of the strategy, as self.log(sync_dist=True) and self.all_gather do",
    "looks up rows of a table after a block",
)
BEGIN_TRAINING, BEGIN_EVALUATION, END_FORWARD, END_STEP, END_BACKWARD, COLLECTIVE, LOOK_UP = range(len(POINTS))
# Numbers in every exchange: two for the entry, one for whether a rank departs, one per kind of entry, two for the reads
# and one for whether a rank is idle.
_KINDS, _IDLE, _HEAD = 3, 8, 9
# Less than the code of any entry, and less than any negated code.
_NO_CODE = -(1 << 62)


class EntryKind(IntEnum):
    """The kind of collective that a rank is about to enter."""

    UNSHARD = 0
    REDUCE = 1
    MEET = 2


class Entry(NamedTuple):
    """The collective that a rank is about to enter.

    Attributes:
        kind: the all-gather or the reduction of a group, or a point where all ranks meet.
        number: the index of the group or of the point.
        parameters: the parameters of the group that take part.
    """

    kind: EntryKind
    number: int
    parameters: tuple[int, ...] = ()

    @property
    def code(self) -> int:
        """A number that identifies the entry; its upper bits are kind and number, from which `Entry.of` restores it."""
        return (self.kind << 16 | self.number) << 32 | zlib.crc32(repr(self.parameters).encode())

    @classmethod
    def of(cls, code: int) -> Entry:
        """Return the entry of a code, without its parameters."""
        place = code >> 32
        return cls(EntryKind(place >> 16), place & 0xFFFF)

    def describe(self, names: Sequence[str]) -> str:
        """Describe the action of a rank that is about to enter this collective; `names` are those of the groups."""
        if self.kind is EntryKind.MEET:
            return POINTS[self.number]
        name = repr(names[self.number] or "the root") if self.number < len(names) else "the root"
        return f"gathers {name}" if self.kind is EntryKind.UNSHARD else f"reduces gradients of {name}"


class ReadLog:
    """The sharded tensors that this rank has read.

    Attributes:
        code: a number that identifies all of them in their order.
    """

    def __init__(self) -> None:
        self.code, self._last = 0, ""

    def add(self, name: str) -> None:
        """Record the read of a tensor."""
        self.code, self._last = zlib.crc32(name.encode(), self.code), name

    def differ(self, ranks: dist.ProcessGroup) -> PlanError:
        """Return the error for ranks that have read different tensors; a collective of `ranks`."""
        names: list[Any] = [None] * ranks.size()
        dist.all_gather_object(names, self._last, ranks)
        read = " and ".join(map(repr, dict.fromkeys(name for name in names if name))) or "none"
        return PlanError(
            f"ranks read different sharded tensors, {read} last, and reads are collectives, whose numbers are of both"
            " then; read the same on all ranks, or within `with self.trainer.strategy.full_parameters():`."
        )


class Told(NamedTuple):
    """The result of a round, equal on all ranks.

    Attributes:
        between: two entries that ranks are about to enter; different ones if the ranks differ.
        same: whether all ranks are about to enter the same collective.
        departed: whether a rank departs from the step that is followed.
        kinds: the kinds of all ranks' entries.
        reads_same: whether all ranks have read the same sharded tensors.
        idle: whether a rank has nothing to compute and meets the others at any point.
        wanted: indices of groups that any rank wants to gather.
        complete: by index of a group for which no rank awaits more gradients, the parameters with a gradient to reduce
            on any rank.
    """

    between: tuple[Entry, Entry]
    same: bool
    departed: bool
    kinds: set[EntryKind]
    reads_same: bool
    idle: bool = False
    wanted: Sequence[int] = ()
    complete: Mapping[int, tuple[int, ...]] = MappingProxyType({})

    def disagreement(self, names: Sequence[str]) -> PlanError:
        """Return the error for ranks that are about to enter different collectives.

        Args:
            names: the names of the groups, by index; the root's is empty.
        """
        one, other = (entry.describe(names) for entry in self.between)
        if one == other:
            other += ", of other tensors"
        return PlanError(
            f"a rank {one} where another {other}, so they would wait for one another for ever; let all ranks of a"
            " sharded plan run the same steps, backwards and collectives (blocks may differ), or use dp_replicate."
        )


class Round:
    """One exchange of the entries that ranks are about to enter.

    Args:
        entry: this rank's entry.
        sizes: number of parameters per group; the same in all rounds, since gloo ends the process if ranks at different
            places send tensors of different sizes.
        departs: whether this rank departs from the step that is followed.
        reads: a number that identifies all sharded tensors that this rank has read.
        idle: whether `entry` is a meeting point and this rank has nothing to compute, so it meets the others at any.
    """

    def __init__(
        self, entry: Entry, sizes: Sequence[int], *, departs: bool = False, reads: int = 0, idle: bool = False
    ) -> None:
        self._sizes = sizes
        # A step may have changed the default device, and gloo needs the CPU.
        self._numbers = torch.zeros(_HEAD + 2 * len(sizes) + sum(sizes), dtype=torch.int64, device="cpu")
        greatest, negated = (_NO_CODE, _NO_CODE) if idle else (entry.code, -entry.code)
        self._numbers[0], self._numbers[1], self._numbers[2] = greatest, negated, int(departs)
        self._numbers[_KINDS + entry.kind] = 1
        self._numbers[_IDLE - 2], self._numbers[_IDLE - 1], self._numbers[_IDLE] = reads, -reads, int(idle)

    def want(self, group: int) -> None:
        """Announce that this rank is about to gather a group, as soon as all ranks do."""
        self._parts[0][group] = 1

    def await_more(self, group: int) -> None:
        """Announce that this rank's backward will give a group more gradients."""
        self._parts[1][group] = 1

    def offer(self, group: int, parameters: Sequence[int]) -> None:
        """Announce that this rank has gradients to reduce for these parameters of a group."""
        start = sum(self._sizes[:group])
        self._parts[2][[start + parameter for parameter in parameters]] = 1

    def begin(self, ranks: dist.ProcessGroup) -> Any:
        """Start the all-reduce asynchronously; return the work to wait for before calling `told`."""
        return dist.all_reduce(self._numbers, dist.ReduceOp.MAX, ranks, async_op=True)

    def told(self) -> Told:
        """Return the result of the exchange."""
        greatest, least, departed, *kinds, most_read, least_read, idle = self._numbers[:_HEAD].tolist()
        told = Told(
            between=(Entry.of(-least), Entry.of(greatest)),
            same=greatest == -least,
            departed=bool(departed),
            kinds={kind for kind in EntryKind if kinds[kind]},
            reads_same=most_read == -least_read,
            idle=bool(idle),
        )
        if not self._numbers[_HEAD:].any():
            return told
        gathers, awaits, gradients = self._parts
        starts = itertools.accumulate(self._sizes, initial=0)
        complete = {}
        for group, (start, stop) in enumerate(itertools.pairwise(starts)):
            if not awaits[group] and (found := gradients[start:stop].nonzero().flatten().tolist()):
                complete[group] = tuple(found)
        return told._replace(wanted=gathers.nonzero().flatten().tolist(), complete=complete)

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Flags per group for a gather and for awaited gradients, and flags per parameter for a gradient."""
        groups = len(self._sizes)
        gathers, awaits, gradients = self._numbers[_HEAD:].tensor_split((groups, 2 * groups))
        return gathers, awaits, gradients
