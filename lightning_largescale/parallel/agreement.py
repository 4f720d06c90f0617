"""Agreement of the data-parallel ranks on the collectives of a step, where each may run other modules.

FSDP2 all-gathers a group when this rank runs its module, and reduces its gradients when this rank's backward has come
past it; the other ranks are taken to do the same at the same time. Where they do not (experts chosen by the data,
layers left out at random, an early exit), one rank's all-gather would meet that of another group on another rank, and
both compute with mixed shards, or wait for ever.

Two ways to be sure of it:

- A step whose collectives were the same on all ranks is *followed*: each rank compares its own with those of that step
  before it enters them, without communication. A rank that is about to enter another first goes along with the others
  as that step has it, computing nothing, up to the next point where all meet: the end of the forward, of a backward, or
  a collective that the strategy is asked for.
- From there on, and in the first steps, collectives are *agreed on*: before each, ranks tell one another what they
  want; all of them then enter all that was wanted, in one order, with zeros for gradients that they do not have. A rank
  that has come to a point where all meet goes on taking part until the others have.

The gradient of a parameter that no rank has used stays None; of one that some have used it is the average over all,
those counting zero that have not, as under DistributedDataParallel.

Source: torch.distributed.algorithms.join for taking part in others' collectives.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.average import average_in_place
from lightning_largescale.parallel.parameter_access import GRADIENT
from lightning_largescale.parallel.rounds import (
    BEGIN_EVALUATION,
    BEGIN_TRAINING,
    COLLECTIVE,
    END_BACKWARD,
    END_FORWARD,
    END_STEP,
    LOOK_UP,
    POINTS,
    Entry,
    EntryKind,
    Round,
    Told,
)

# Agreed steps after which one is followed again, at most: a model whose ranks differ now and then is agreed on.
_MOST_PATIENCE = 64


@dataclass
class _Pattern:
    """What is known of the steps of one kind.

    Attributes:
        followed: the entries of a step, if the next one follows it.
        last: of the last agreed step in which all ranks had the same.
        calm: how many agreed steps in a row had the same.
        patience: after how many of them one is followed.
    """

    followed: list[Entry] | None = None
    last: list[Entry] = field(default_factory=list)
    calm: int = 0
    patience: int = 1

    def learn(self, entries: list[Entry], *, same: bool, departed: bool) -> None:
        """Take note of a step: its entries on this rank, whether all ranks had the same, or one departed from what was
        followed.
        """
        if departed:
            self.patience = min(2 * self.patience, _MOST_PATIENCE)
        if not same:
            self.followed, self.calm = None, 0
        elif self.followed is None:
            self.calm = self.calm + 1 if self.calm and entries == self.last else 1
            self.last = entries
            if self.calm >= self.patience:
                self.followed = entries


def _nothing() -> None:
    pass


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """What calls `method` while its object is there: a step that ended halfway keeps nothing alive."""
    found = weakref.WeakMethod(method)

    def differentiate(engine: Callable[..., Any], inputs: Sequence[torch.Tensor], **how: bool) -> Any:
        method = found()
        return engine(inputs) if method is None else method(engine, inputs, **how)

    return differentiate


class Agreement:
    """The collectives of a sharded module's steps, entered by all ranks in one order.

    Args:
        module: the root.
        groups: modules that own an FSDP group, by name, the root as "".
        beside: modules that own a group which is gathered with the root.
        unsharded: parameters that FSDP ignores, whose gradients are averaged over all processes.
        ranks: those that compute different samples, this one among them, in a gloo group of their own.
        before: called before ranks wait for one another, but for the root's all-gather.
        synchronizes: whether the backward under way reduces gradients.

    Attributes:
        trained: that is to be averaged at the end of this backward: places in `unsharded`.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[str, nn.Module],
        beside: Sequence[nn.Module],
        unsharded: Sequence[nn.Parameter],
        ranks: dist.ProcessGroup,
        *,
        before: Callable[[], None],
        synchronizes: Callable[[], bool],
    ) -> None:
        own = [(name, group) for name, group in groups.items() if compat.has_group(group)]
        own += [("", group) for group in beside]
        self._names = [name for name, _ in own]
        self._groups = [compat.GroupCollectives(group) for _, group in own]
        self._unsharded, self._ranks = list(unsharded), ranks
        self._call_before, self._synchronizes = before, synchronizes
        self.trained: set[int] = set()
        # Of all sharded tensors that were read, in their order; and the last of them.
        self._reads, self._last_read = 0, ""
        self._leave_engine: Callable[[], None] = _nothing
        self._sizes = [*(group.parameters for group in self._groups), len(self._unsharded)]
        self._patterns: dict[tuple[bool, bool], _Pattern] = {}
        self._undo = [compat.before_backward_ends(module, self._end_backward)]
        for index, group in enumerate(self._groups):
            self._undo.append(group.intercept(partial(self._unshard, index), partial(self._reduce, index)))
        self.forget()

    def stop(self) -> None:
        """Let FSDP's groups enter their collectives by themselves."""
        self._leave_engine()
        for undo in reversed(self._undo):
            undo()

    def forget(self) -> None:
        """Know nothing of the step under way, which ended halfway on all ranks, and of those before."""
        self._patterns.clear()
        self._pattern: _Pattern | None = None
        self._began: tuple[Any, Round] | None = None
        self._followed: list[Entry] | None = None
        self._reads, self._last_read = 0, ""
        self.trained.clear()
        self._reset()

    def _reset(self) -> None:
        self._leave_engine()
        self._leave_engine = _nothing
        self._position, self._own = 0, list[Entry]()
        self._same, self._departed = True, False
        self._look_up_along: Callable[[], None] | None = None
        self._goes_on = self._ending = self._differentiates = False
        # Backwards that are to come past each group.
        self._expected = [0] * len(self._groups)
        # Reduced parameters, by group and index: those that had no gradient before, that this rank gave one, and whose
        # hooks were not called.
        self._fresh, self._given, self._unnoticed = (set[tuple[int, int]]() for _ in range(3))

    # Steps

    @contextmanager
    def step(
        self, name: str, *, synchronize: bool = True, look_up_along: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """A step, up to the end of its forward; the caller says by `end_forward` how it goes on.

        Args:
            name: "training_step", or another.
            synchronize: whether its backward reduces gradients.
            look_up_along: makes this rank take part in look-ups that others begin after a block; given where it has
                nothing to compute, and only takes part in what others do.
        """
        training = name == "training_step"
        self._reset()
        self._pattern = self._patterns.setdefault((training, synchronize), _Pattern())
        self._followed, self._look_up_along = self._pattern.followed, look_up_along
        # Waited for where ranks meet next, which is where it is noticed that they have begun different kinds of steps.
        point = Entry(EntryKind.MEET, BEGIN_TRAINING if training else BEGIN_EVALUATION)
        began = Round(point, self._sizes, reads=self._reads)
        self._began = began.begin(self._ranks), began
        self._leave_engine = compat.around_engine(_weakly(self._differentiate))
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def end_forward(self, *, backward: bool) -> None:
        """The end of a step's forward, or of the whole step.

        Args:
            backward: whether the step goes on with one.
        """
        self._goes_on = backward
        self._meet(Entry(EntryKind.MEET, END_FORWARD if backward else END_STEP))
        if not backward:
            self._end_step()

    def note_forward(self, name: str) -> None:
        """Expect a backward to come past the group of this name, whose module runs."""
        if compat.current_node_sequence() is None:
            self._expected[self._names.index(name)] += 1

    def meet(self, *which: int, point: int = COLLECTIVE) -> None:
        """Wait, in a step, until all ranks are about to enter a collective that is none of FSDP's.

        Args:
            which: numbers that tell it from others of its kind.
            point: COLLECTIVE or LOOK_UP.

        Raises:
            PlanError: they are about to enter different ones, or at different points.
        """
        if self._pattern is not None:
            self._meet(Entry(EntryKind.MEET, point, which))

    def note_read(self, name: str) -> None:
        """Take note that this rank reads a sharded tensor, which all are to do: ranks compare that where they meet."""
        self._reads, self._last_read = zlib.crc32(name.encode(), self._reads), name

    def _end_step(self) -> None:
        if self._pattern is not None:
            self._pattern.learn(self._own, same=self._same, departed=self._departed)
        self._pattern = self._followed = self._look_up_along = None
        self._leave_engine()

    # What this rank is about to enter

    def _unshard(self, index: int, issue: Callable[[], None]) -> None:
        entry = Entry(EntryKind.UNSHARD, index)
        if self._follows(entry):
            self._before(entry)
            issue()
        else:
            self._tell(entry, issue)

    def _reduce(self, index: int, issue: Callable[[], None]) -> None:
        group = self._groups[index]
        self._expected[index] -= 1
        entry = Entry(EntryKind.REDUCE, index, group.unreduced())
        if not group.reduces or not entry.parameters:
            issue()
            return
        if self._follows(entry):
            self._given.update((index, one) for one in entry.parameters)
            issue()
            return
        group.keep_unreduced()
        self._tell(entry)

    def _differentiate(
        self, engine: Callable[..., Any], inputs: Sequence[torch.Tensor], *, create_graph: bool, accumulate: bool
    ) -> Any:
        """Run `torch.autograd.grad`, which reduces nothing: other ranks need not come to an end of it, and another
        backward may come past the same groups.
        """
        if accumulate:
            return engine(inputs)
        before = self._differentiates, self._expected
        self._differentiates, self._expected = True, [*self._expected]
        try:
            return engine(inputs)
        finally:
            self._differentiates, self._expected = before

    def _end_backward(self) -> None:
        """The backward is over on this rank."""
        for group in self._groups:
            # As FSDP would next: their inputs needed no gradient.
            if not group.is_through_backward:
                group.end_backward()
        if self._differentiates:
            return
        self._ending = True
        if self.trained and self._synchronizes():
            entry = Entry(EntryKind.REDUCE, len(self._groups), tuple(sorted(self.trained)))
            if self._follows(entry):
                self._average(entry.parameters)
            else:
                # So that all know it where they are of other parameters.
                self._tell(entry)
        self._meet(Entry(EntryKind.MEET, END_BACKWARD))
        if self._departed:
            self._settle()
        self._ending, self._expected = False, [0] * len(self._groups)
        if self._goes_on:
            self._end_step()

    def _follows(self, entry: Entry) -> bool:
        """Whether the step that is followed has `entry` next; if not, it is followed no more."""
        self._own.append(entry)
        if self._followed is None:
            return False
        if self._position < len(self._followed) and self._followed[self._position] == entry:
            self._position += 1
            return True
        # All ranks are past the root's gather, or have it to themselves: what they look up comes first.
        self._before(entry)
        self._depart(self._go_along())
        return False

    def _meet(self, point: Entry) -> None:
        """Wait until all ranks are at `point`, taking part in what they do before.

        Raises:
            PlanError: they meet at different points.
        """
        self._own.append(point)
        while self._followed is not None:
            expected = self._position < len(self._followed) and self._followed[self._position] == point
            self._before(point)
            nearest = point if expected else self._go_along()
            if not expected and not self._is_idle:
                self._depart(nearest)
                break
            told = self._exchange(nearest)
            self._position += 1
            if told.departed:
                self._followed, self._departed, self._same = None, True, False
            elif nearest == point or not self._meets_along(nearest):
                return
        while True:
            told = self._tell(point)
            if told.kinds != {EntryKind.MEET}:
                continue
            if not told.same:
                raise self._differ(told)
            if not self._meets_along(told.between[0]):
                return

    @property
    def _is_idle(self) -> bool:
        return self._look_up_along is not None

    def _meets_along(self, point: Entry) -> bool:
        """Whether this rank, being idle, met the others at a `point` that is not the last of their step."""
        if self._look_up_along is None or point.number == END_STEP:
            return False
        if point.number == LOOK_UP:
            self._look_up_along()
        return True

    def _go_along(self) -> Entry:
        """Enter what the step that is followed has next, computing nothing; the point where all meet after it."""
        assert self._followed is not None
        while (entry := self._followed[self._position]).kind is not EntryKind.MEET:
            self._before(entry)
            self._join(entry.number, entry.parameters if entry.kind is EntryKind.REDUCE else None, own=False)
            self._position += 1
        return entry

    def _depart(self, point: Entry) -> None:
        """Tell the others, at the point where all meet, that this rank enters another than the step has."""
        self._exchange(point, departs=True)
        self._followed, self._departed, self._same = None, True, False

    # What all ranks are about to enter

    def _tell(self, entry: Entry, issue: Callable[[], None] | None = None) -> Told:
        """Enter what any rank wants to enter, `entry` being what this one wants.

        Args:
            entry: of this rank.
            issue: enters it, where it is an all-gather.

        Raises:
            PlanError: outside of a step, which has no end where others could be waited for, they want different ones.
        """
        told = self._exchange(entry, wants=True)
        self._same &= told.same and not told.idle
        if self._pattern is None and not told.same:
            raise self._differ(told)
        for index in told.wanted:
            if issue is not None and index == entry.number:
                issue()
            else:
                self._join(index, None)
        for index, parameters in told.complete.items():
            self._join(index, parameters)
        return told

    def _join(self, index: int, parameters: tuple[int, ...] | None, *, own: bool = True) -> None:
        """Take part in the all-gather of a group, or in the reduction of some of its parameters."""
        if parameters is None:
            self._groups[index].join_unshard()
        elif index == len(self._groups):
            self._average(parameters)
        else:
            fresh, given = self._groups[index].reduce(parameters, own=own)
            self._fresh.update((index, one) for one in fresh)
            self._given.update((index, one) for one in given)
            change = self._unnoticed.difference_update if own else self._unnoticed.update
            change((index, one) for one in parameters)

    def _average(self, indices: Sequence[int]) -> None:
        """Average the gradients of parameters that FSDP ignores over all ranks."""
        for index in indices:
            parameter, place = self._unsharded[index], (len(self._groups), index)
            if index in self.trained:
                self._given.add(place)
            elif GRADIENT.__get__(parameter) is None:
                self._fresh.add(place)
                # What is assigned to `grad` as users do it is averaged.
                GRADIENT.__set__(parameter, torch.zeros_like(parameter))
            average_in_place(GRADIENT.__get__(parameter))
        self.trained.difference_update(indices)

    def _settle(self) -> None:
        """Let parameters have no gradient that were only reduced since a step before had them reduced, and call the
        hooks of the others that this rank had reduced without.
        """
        given = torch.zeros(len(self._sizes), max(self._sizes), dtype=torch.uint8, device="cpu")
        for place in self._given:
            given[place] = 1
        dist.all_reduce(given, dist.ReduceOp.MAX, self._ranks)
        unused = {place for place in self._fresh if not given[place]}
        for group, index in unused:
            if group == len(self._groups):
                GRADIENT.__set__(self._unsharded[index], None)
            else:
                self._groups[group].drop_gradient(index)
        for group, index in sorted(self._unnoticed - unused, reverse=True):
            self._groups[group].notice_gradient(index)
        self._fresh.clear()
        self._unnoticed.clear()

    def _exchange(self, entry: Entry, *, departs: bool = False, wants: bool = False) -> Told:
        """What the ranks are about to enter.

        Args:
            entry: of this rank.
            departs: from the step that is followed.
            wants: it is entered after this, by all ranks, with whatever any of them wants to enter.

        Raises:
            PlanError: they began different kinds of steps, or come to different points where all meet.
        """
        self._before(entry)
        if self._began is not None:
            (work, began), self._began = self._began, None
            work.wait()
            if not (told := began.told()).same:
                raise self._differ(told)
            if not told.reads_same:
                raise self._read_others()
        idle = self._is_idle and entry.kind is EntryKind.MEET
        own = Round(entry, self._sizes, departs=departs, reads=self._reads, idle=idle)
        if wants:
            if entry.kind is EntryKind.UNSHARD:
                own.want(entry.number)
            self._offer(own, entry)
        own.begin(self._ranks).wait()
        told = own.told()
        if not wants and not told.same:
            raise self._differ(told)
        # An idle rank cannot take part in what is none of FSDP's, nor in a backward.
        met = told.between[1].number if told.kinds == {EntryKind.MEET} and not told.departed else END_STEP
        if told.idle and met not in (END_STEP, LOOK_UP, BEGIN_EVALUATION):
            raise self._differ(told._replace(between=(Entry(EntryKind.MEET, END_STEP), told.between[1])))
        # Ranks that depart have yet to come to where the others are.
        if told.same and entry.kind is EntryKind.MEET and not told.departed and not told.reads_same:
            raise self._read_others()
        return told

    def _before(self, entry: Entry) -> None:
        # The root is gathered before ranks do anything else.
        if entry.kind is not EntryKind.UNSHARD or self._names[entry.number]:
            self._call_before()

    def _offer(self, own: Round, entry: Entry) -> None:
        """Tell of the gradients that this rank has, and of those that are to come."""
        in_backward = compat.current_node_sequence() is not None
        for index, group in enumerate(self._groups):
            # The root is come past at the end.
            comes = not in_backward or self._expected[index] > 0 or not self._names[index]
            # Outside of a backward are gradients reduced that were set by hand.
            by_hand = not in_backward and entry.kind is EntryKind.REDUCE and entry.number == index
            if comes and not by_hand and not self._ending:
                own.await_more(index)
            if group.reduces:
                own.offer(index, group.unreduced())
        if not self._ending:
            own.await_more(len(self._groups))
        if self._synchronizes():
            own.offer(len(self._groups), sorted(self.trained))

    def _differ(self, told: Told) -> PlanError:
        one, other = map(self._describe, told.between)
        if one == other:
            other += ", of other tensors"
        return PlanError(
            f"a rank {one} where another {other}, so they would wait for one another for ever; let all ranks of a"
            " sharded plan run the same steps, backwards and collectives (blocks may differ), or use dp_replicate."
        )

    def _read_others(self) -> PlanError:
        names: list[Any] = [None] * self._ranks.size()
        dist.all_gather_object(names, self._last_read, self._ranks)
        read = " and ".join(map(repr, dict.fromkeys(name for name in names if name))) or "none"
        return PlanError(
            f"ranks read different sharded tensors, {read} last, and reads are collectives, whose numbers are of both"
            " then; read the same on all ranks, or within `with self.trainer.strategy.full_parameters():`."
        )

    def _describe(self, entry: Entry) -> str:
        if entry.kind is EntryKind.MEET:
            return POINTS[entry.number]
        name = repr(self._names[entry.number] or "the root") if entry.number < len(self._names) else "the root"
        return f"gathers {name}" if entry.kind is EntryKind.UNSHARD else f"reduces gradients of {name}"
