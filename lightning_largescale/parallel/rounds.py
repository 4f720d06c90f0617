"""What data-parallel ranks tell one another before they enter collectives: one all-reduce of a few numbers on the CPU.

Each number is a fact that holds on any of the ranks, so their maximum is what all of them know afterwards.
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

# Points where all ranks meet, by what a rank does there.
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
# Numbers that every exchange has: two of the entry, whether a rank departs, the kinds of entries, two of the reads, and
# whether a rank is idle.
_KINDS, _IDLE, _HEAD = 3, 8, 9
# Less than the code of any entry, and than what is greater the less it is.
_NO_CODE = -(1 << 62)


class EntryKind(IntEnum):
    """Of what a rank is about to enter."""

    UNSHARD = 0
    REDUCE = 1
    MEET = 2


class Entry(NamedTuple):
    """What a rank is about to enter: the all-gather or the reduction of a group, of some of its parameters, or a point
    where all meet, by its number.
    """

    kind: EntryKind
    number: int
    parameters: tuple[int, ...] = ()

    @property
    def code(self) -> int:
        """A number that tells it from all others; of the greater part of it `Entry.of` makes it again."""
        return (self.kind << 16 | self.number) << 32 | zlib.crc32(repr(self.parameters).encode())

    @classmethod
    def of(cls, code: int) -> Entry:
        """The entry of a code, but for its parameters."""
        place = code >> 32
        return cls(EntryKind(place >> 16), place & 0xFFFF)


class Told(NamedTuple):
    """What the ranks told one another.

    Attributes:
        between: two of the entries that they are about to enter, different ones if there are such.
        same: all are about to enter the same.
        departed: a rank is about to enter another than the step that is followed has.
        kinds: of what they are about to enter.
        reads_same: they have read the same sharded tensors.
        idle: a rank has nothing to compute and meets the others wherever they do.
        wanted: indices of groups that any of them wants to gather.
        complete: parameters with a gradient to reduce on any rank, by index of a group that none awaits more of.
    """

    between: tuple[Entry, Entry]
    same: bool
    departed: bool
    kinds: set[EntryKind]
    reads_same: bool
    idle: bool = False
    wanted: Sequence[int] = ()
    complete: Mapping[int, tuple[int, ...]] = MappingProxyType({})


class Round:
    """One time that ranks tell one another what they are about to enter.

    Args:
        entry: of this rank.
        sizes: how many parameters each group has; the same in all rounds, since gloo ends the process where ranks send
            unequal numbers, as ranks do that are at unlike places.
        departs: whether this rank departs from the step that is followed.
        reads: a number of all sharded tensors that this rank has read.
        idle: `entry` is a point where all meet, and this rank has nothing to compute, so it meets them at any.
    """

    def __init__(
        self, entry: Entry, sizes: Sequence[int], *, departs: bool = False, reads: int = 0, idle: bool = False
    ) -> None:
        self._sizes = sizes
        # The device that a step may have made the default is not gloo's.
        self._numbers = torch.zeros(_HEAD + 2 * len(sizes) + sum(sizes), dtype=torch.int64, device="cpu")
        greatest, negated = (_NO_CODE, _NO_CODE) if idle else (entry.code, -entry.code)
        self._numbers[0], self._numbers[1], self._numbers[2] = greatest, negated, int(departs)
        self._numbers[_KINDS + entry.kind] = 1
        self._numbers[_IDLE - 2], self._numbers[_IDLE - 1], self._numbers[_IDLE] = reads, -reads, int(idle)

    def want(self, group: int) -> None:
        """Tell that this rank is about to gather a group, as soon as all ranks do."""
        self._parts[0][group] = 1

    def await_more(self, group: int) -> None:
        """Tell that this rank's backward will give a group more gradients."""
        self._parts[1][group] = 1

    def offer(self, group: int, parameters: Sequence[int]) -> None:
        """Tell that this rank has gradients to reduce, of some parameters of a group."""
        start = sum(self._sizes[:group])
        self._parts[2][[start + parameter for parameter in parameters]] = 1

    def begin(self, ranks: dist.ProcessGroup) -> Any:
        """Send what this rank tells, without waiting; what to wait for before `told`."""
        return dist.all_reduce(self._numbers, dist.ReduceOp.MAX, ranks, async_op=True)

    def told(self) -> Told:
        """What all ranks told."""
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
        """By group whether it is to be gathered and whether more gradients come; by parameter whether it has one."""
        groups = len(self._sizes)
        gathers, awaits, gradients = self._numbers[_HEAD:].tensor_split((groups, 2 * groups))
        return gathers, awaits, gradients
