"""Agreement of data-parallel ranks on the collectives of a step, in which each rank may run other modules.

FSDP2 all-gathers a group when this rank runs the group's module, and reduces the group's gradients when this rank's
backward has passed it; it assumes that the other ranks do the same at the same time. Ranks that do not (experts chosen
by the data, layers left out at random, an early exit) would pair the all-gather of one group with that of another, and
compute with mixed shards, or deadlock.

There are two ways to enter the same collectives on all ranks:

- A step *follows* an earlier one whose collectives were the same on all ranks: each rank compares its own collectives
  with those of that step before it enters them, without communication. A rank that is about to enter another first goes
  along with the earlier step, without computation, to the next point where all ranks meet: the end of the forward or of
  a backward, or a collective that the strategy enters.
- After such a departure, and in the first steps, collectives are *agreed*: before each, the ranks exchange what they
  want to enter. Then all ranks enter all of it, in one order, with zeros for gradients that they do not have. A rank at
  a point where all ranks meet takes part until the others have come there.

The gradient of a parameter that no rank has used stays None. Any other gradient is the average over all ranks, with
zeros for ranks that have not used the parameter, as under DistributedDataParallel.

Source: torch.distributed.algorithms.join, for taking part in the collectives of other ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_largescale import compat
from lightning_largescale.parallel.joined_groups import JoinedGroups
from lightning_largescale.parallel.rounds import (
    BEGIN_EVALUATION,
    BEGIN_TRAINING,
    COLLECTIVE,
    END_BACKWARD,
    END_FORWARD,
    END_STEP,
    LOOK_UP,
    Entry,
    EntryKind,
    ReadLog,
    Round,
    Told,
)
from lightning_largescale.parallel.step_pattern import StepEntries, StepPattern


def _nothing() -> None:
    pass


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `method` while its object lives: a step that ended halfway keeps nothing alive."""
    found = weakref.WeakMethod(method)

    def differentiate(engine: Callable[..., Any], inputs: Sequence[torch.Tensor], **how: bool) -> Any:
        method = found()
        return engine(inputs) if method is None else method(engine, inputs, **how)

    return differentiate


class Agreement:
    """The collectives of a sharded module's steps, which all ranks enter in one order.

    Args:
        module: the root.
        groups: the modules that own an FSDP group, by name; the root is "".
        beside: modules that own a group which is unsharded with the root.
        unsharded: parameters that FSDP ignores, whose gradients are averaged over all processes.
        ranks: a separate gloo group of this rank and those that compute different samples.
        before: called before ranks wait for one another, except for the root's all-gather.
        synchronizes: returns whether the backward under way reduces gradients.

    Attributes:
        ranks: the gloo group.
        trained: indices in `unsharded` of gradients to average at the end of this backward.
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
        named = [(name, group) for name, group in groups.items() if compat.has_group(group)]
        self._groups = JoinedGroups([*named, *(("", group) for group in beside)], unsharded)
        self.trained = self._groups.trained
        self.ranks = ranks
        self._call_before, self._synchronizes = before, synchronizes
        self._leave_engine: Callable[[], None] = _nothing
        self._patterns: dict[tuple[bool, bool], StepPattern] = {}
        self._undo = [compat.before_backward_ends(module, self._end_backward)]
        for index, group in enumerate(self._groups.collectives):
            self._undo.append(group.intercept(partial(self._unshard, index), partial(self._reduce, index)))
        self.forget()

    def stop(self) -> None:
        """Let FSDP's groups enter their collectives by themselves."""
        self._leave_engine()
        for undo in reversed(self._undo):
            undo()

    def forget(self) -> None:
        """Discard all steps so far, of which the last may have ended halfway on all ranks."""
        self._patterns.clear()
        self._began: tuple[Any, Round] | None = None
        self._reads = ReadLog()
        self.trained.clear()
        self._reset()

    def _reset(self) -> None:
        self._leave_engine()
        self._leave_engine = _nothing
        self._groups.reset()
        self._step = StepEntries()
        self._look_up_along: Callable[[], None] | None = None
        self._goes_on = self._ending = self._differentiates = False

    # Steps

    @contextmanager
    def step(
        self, name: str, *, synchronize: bool = True, look_up_along: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Context of a step up to the end of its forward, at which the caller calls `end_forward`.

        Args:
            name: "training_step", or another.
            synchronize: whether the step's backward reduces gradients.
            look_up_along: takes part in look-ups that other ranks begin after a block; given if this rank has nothing
                to compute and only takes part in the collectives of the others.
        """
        training = name == "training_step"
        self._reset()
        self._step = StepEntries(self._patterns.setdefault((training, synchronize), StepPattern()))
        self._look_up_along = look_up_along
        # Awaited where the ranks meet next; ranks that began different kinds of steps are detected there.
        point = Entry(EntryKind.MEET, BEGIN_TRAINING if training else BEGIN_EVALUATION)
        began = Round(point, self._groups.sizes, reads=self._reads.code)
        self._began = began.begin(self.ranks), began
        self._leave_engine = compat.around_engine(_weakly(self._differentiate))
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def end_forward(self, *, backward: bool) -> None:
        """End a step's forward; without a backward, end the step.

        Args:
            backward: whether the step continues with a backward.
        """
        self._goes_on = backward
        self._meet(Entry(EntryKind.MEET, END_FORWARD if backward else END_STEP))
        if not backward:
            self._end_step()

    def note_forward(self, name: str) -> None:
        """Expect a backward to pass the group of this name, whose module runs."""
        if compat.current_node_sequence() is None:
            self._groups.expect(name)

    def meet(self, *which: int, point: int = COLLECTIVE) -> None:
        """Wait, in a step, until all ranks are about to enter a collective that is not FSDP's.

        Args:
            which: numbers that distinguish it from others of its kind.
            point: COLLECTIVE or LOOK_UP.

        Raises:
            PlanError: the ranks are about to enter different collectives, or are at different points.
        """
        if self._step.is_running:
            self._meet(Entry(EntryKind.MEET, point, which))

    def note_read(self, name: str) -> None:
        """Record that this rank reads a sharded tensor; the ranks compare their reads where they meet."""
        self._reads.add(name)

    def _end_step(self) -> None:
        self._step.end()
        self._step, self._look_up_along = StepEntries(), None
        self._leave_engine()

    # Collectives that this rank is about to enter

    def _unshard(self, index: int, issue: Callable[[], None]) -> None:
        entry = Entry(EntryKind.UNSHARD, index)
        if self._follows(entry):
            self._before(entry)
            issue()
        else:
            self._tell(entry, issue)

    def _reduce(self, index: int, issue: Callable[[], None]) -> None:
        group = self._groups.collectives[index]
        self._groups.expected[index] -= 1
        entry = Entry(EntryKind.REDUCE, index, group.unreduced())
        if not group.reduces or not entry.parameters:
            issue()
            return
        if self._follows(entry):
            self._groups.give(index, entry.parameters)
            issue()
            return
        group.keep_unreduced()
        self._tell(entry)

    def _differentiate(
        self, engine: Callable[..., Any], inputs: Sequence[torch.Tensor], *, create_graph: bool, accumulate: bool
    ) -> Any:
        """Run autograd's engine: a backward that accumulates gradients as it is, `torch.autograd.grad` on its own.

        The latter reduces nothing, so the other ranks need not reach its end, and the backwards that are still to pass
        the groups stay the same.
        """
        if accumulate:
            return engine(inputs)
        before = self._differentiates, self._groups.expected
        self._differentiates, self._groups.expected = True, [*self._groups.expected]
        try:
            return engine(inputs)
        finally:
            self._differentiates, self._groups.expected = before

    def _end_backward(self) -> None:
        """End this rank's backward."""
        for group in self._groups.collectives:
            # FSDP would do this next: inputs of these groups needed no gradient.
            if not group.is_through_backward:
                group.end_backward()
        if self._differentiates:
            return
        self._ending = True
        if self.trained and self._synchronizes():
            entry = Entry(EntryKind.REDUCE, self._groups.last, tuple(sorted(self.trained)))
            if self._follows(entry):
                self._groups.average(entry.parameters)
            else:
                # Ranks that have trained other parameters need to know.
                self._tell(entry)
        self._meet(Entry(EntryKind.MEET, END_BACKWARD))
        if self._step.departed:
            self._groups.settle(self.ranks)
        self._ending = False
        self._groups.expect_none()
        if self._goes_on:
            self._end_step()

    def _follows(self, entry: Entry) -> bool:
        """Return whether `entry` is next in the step that is followed; if not, stop following it."""
        self._step.own.append(entry)
        if self._step.followed is None:
            return False
        if self._step.has_next(entry):
            self._step.advance()
            return True
        # The root's all-gather is over, or is this rank's own: look-ups come first.
        self._before(entry)
        self._depart(self._go_along())
        return False

    def _meet(self, point: Entry) -> None:
        """Wait until all ranks are at `point`, taking part in their collectives before it.

        Raises:
            PlanError: the ranks meet at different points.
        """
        self._step.own.append(point)
        while self._step.followed is not None:
            expected = self._step.has_next(point)
            self._before(point)
            nearest = point if expected else self._go_along()
            if not expected and not self._is_idle:
                self._depart(nearest)
                break
            told = self._exchange(nearest)
            self._step.advance()
            if told.departed:
                self._step.depart()
            elif nearest == point or not self._meets_along(nearest):
                return
        while True:
            told = self._tell(point)
            if told.kinds != {EntryKind.MEET}:
                continue
            if not told.same:
                raise told.disagreement(self._groups.names)
            if not self._meets_along(told.between[0]):
                return

    @property
    def _is_idle(self) -> bool:
        return self._look_up_along is not None

    def _meets_along(self, point: Entry) -> bool:
        """Return whether this rank is idle and met the others at a `point` that does not end their step."""
        if self._look_up_along is None or point.number == END_STEP:
            return False
        if point.number == LOOK_UP:
            self._look_up_along()
        return True

    def _go_along(self) -> Entry:
        """Enter the next collectives of the step that is followed; return the point after them where all ranks meet."""
        while (entry := self._step.next).kind is not EntryKind.MEET:
            self._before(entry)
            self._groups.join(entry.number, entry.parameters if entry.kind is EntryKind.REDUCE else None, own=False)
            self._step.advance()
        return entry

    def _depart(self, point: Entry) -> None:
        """Announce, at a point where all ranks meet, that this rank departs from the step that is followed."""
        self._exchange(point, departs=True)
        self._step.depart()

    # Collectives that all ranks are about to enter

    def _tell(self, entry: Entry, issue: Callable[[], None] | None = None) -> Told:
        """Enter the collectives that any rank wants to enter.

        Args:
            entry: the collective that this rank wants.
            issue: enters it, if it is an all-gather.

        Raises:
            PlanError: the ranks want different collectives outside of a step, which has no end to wait at.
        """
        told = self._exchange(entry, wants=True)
        self._step.same &= told.same and not told.idle
        if not self._step.is_running and not told.same:
            raise told.disagreement(self._groups.names)
        for index in told.wanted:
            if issue is not None and index == entry.number:
                issue()
            else:
                self._groups.join(index, None)
        for index, parameters in told.complete.items():
            self._groups.join(index, parameters)
        return told

    def _exchange(self, entry: Entry, *, departs: bool = False, wants: bool = False) -> Told:
        """Exchange the collectives that ranks are about to enter.

        Args:
            entry: this rank's collective.
            departs: whether this rank departs from the step that is followed.
            wants: whether all ranks enter `entry` afterwards, with the collectives that other ranks want.

        Raises:
            PlanError: the ranks began different kinds of steps, or are at different points where all meet.
        """
        self._before(entry)
        if self._began is not None:
            (work, began), self._began = self._began, None
            work.wait()
            if not (told := began.told()).same:
                raise told.disagreement(self._groups.names)
            if not told.reads_same:
                raise self._reads.differ(self.ranks)
        idle = self._is_idle and entry.kind is EntryKind.MEET
        own = Round(entry, self._groups.sizes, departs=departs, reads=self._reads.code, idle=idle)
        if wants:
            if entry.kind is EntryKind.UNSHARD:
                own.want(entry.number)
            self._groups.offer(own, entry, ending=self._ending, synchronizes=self._synchronizes())
        own.begin(self.ranks).wait()
        told = own.told()
        if not wants and not told.same:
            raise told.disagreement(self._groups.names)
        # An idle rank can take part neither in collectives that are not FSDP's nor in a backward.
        met = told.between[1].number if told.kinds == {EntryKind.MEET} and not told.departed else END_STEP
        if told.idle and met not in (END_STEP, LOOK_UP, BEGIN_EVALUATION):
            told = told._replace(between=(Entry(EntryKind.MEET, END_STEP), told.between[1]))
            raise told.disagreement(self._groups.names)
        # Ranks that depart are not yet where the others are.
        if told.same and entry.kind is EntryKind.MEET and not told.departed and not told.reads_same:
            raise self._reads.differ(self.ranks)
        return told

    def _before(self, entry: Entry) -> None:
        # The root's all-gather comes before all else.
        if entry.kind is not EntryKind.UNSHARD or self._groups.names[entry.number]:
            self._call_before()
