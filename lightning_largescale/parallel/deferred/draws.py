"""Track the states of generators while a construction is recorded, and restore them in the replay.

Nothing is drawn while recording. Instead the generator is set to a marked state. The mark identifies the state when
code saves it and sets it again, and a state that differs reveals a draw that bypassed the recording. Code may seed and
fork generators.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_largescale import compat


class DeferredError(RuntimeError):
    """A construction cannot be deferred exactly; build the module without deferring."""


class Point:
    """A state of one generator.

    Attributes:
        state: the generator's state; None if only drawing yields it.
        made_by: place on the tape of the draw that leads here; None if `state` was given.
        kept: whether code set the generator back to this state.
    """

    __slots__ = ("kept", "made_by", "number", "root", "state")

    def __init__(self, number: int, *, state: Tensor | None = None, made_by: int | None = None, root: Point | None):
        self.number, self.state, self.made_by = number, state, made_by
        self.root = root or self
        self.kept = False


# A mark also identifies the stream within the process, since code may set a state in another generator, or later.
_numbers = itertools.count()
_POINTS = 2**32


class Stream:
    """The sequence of one generator's states in a recording.

    Raises:
        DeferredError: the generator is set to another one's marked state, whose real state only drawing yields.
    """

    def __init__(self, generator: torch.Generator) -> None:
        if compat.mark_of(generator.get_state()) is not None:
            raise DeferredError("a generator is given the state of another one, which was drawn from while recording")
        self.generator = generator
        self._mark = next(_numbers) * _POINTS
        self.points = [Point(0, state=generator.get_state(), root=None)]
        self.current = self.points[0]
        self._began = self._shown = generator.get_state()
        self._followed = True
        self._drew = False

    @property
    def first_state(self) -> Tensor:
        """The state that draws start from: the generator's at the start of the recording, or the one set here."""
        state = self.points[0].state
        return self._began if state is None else state

    @first_state.setter
    def first_state(self, state: Tensor) -> None:
        if torch.equal(state, self.first_state):
            return
        if self._drew or any(one.state is not None and one.root is self.points[0] for one in self.points[1:]):
            raise DeferredError("random values were read while recording, so they cannot be those of another state")
        self.points[0].state = state.clone()

    def enter(self) -> None:
        """Set the generator to marked states from now on."""
        self._followed = torch.equal(self.generator.get_state(), self._began)
        if self._followed:
            self.show()

    def leave(self) -> None:
        """Set the generator back to its state at the start of the recording."""
        if self._followed:
            try:
                self.look()
            finally:
                self._put(self._began)

    def look(self) -> None:
        """Detect whether code seeded the generator or set it back to an earlier state.

        Raises:
            DeferredError: the state changed in any other way.
        """
        if not self._followed:
            raise DeferredError("random numbers are asked of a generator that changed between two recordings")
        state = self.generator.get_state()
        if torch.equal(state, self._shown):
            return
        self.current = self._known(state) or self._seeded(state)
        self.current.kept = True
        self.show()

    def draw(self, place: int) -> tuple[Point, Point]:
        """Record the draw at `place` of the tape; return the states before and after it."""
        self.look()
        before = self.current
        self.current = Point(len(self.points), made_by=place, root=before.root)
        self.points.append(self.current)
        self.show()
        return before, self.current

    def resume(self) -> None:
        """Set the generator to the current real state, which must be known."""
        if self.current.state is None:
            raise DeferredError("the draws that lead to a generator's state were not made")
        self.generator.set_state(self.current.state)

    def drawn(self) -> None:
        """Record the generator's real state as the next one, after a real draw."""
        self._drew = True
        self.current = Point(len(self.points), state=self.generator.get_state(), root=None)
        self.points.append(self.current)
        self.show()

    def show(self) -> None:
        """Set the generator to the marked state of the current point."""
        self._put(self._face(self.current))

    def finish(self, before: Tensor, *, random: bool) -> None:
        """Set the generator's state after a replay.

        With `random` this is the state at the construction's end, provided that `before` and `first_state` are the
        state at the start of the recording. Otherwise it is `before`.
        """
        end = self.current.state
        ours = random and torch.equal(before, self._began) and torch.equal(self.first_state, self._began)
        self.generator.set_state(end if ours and end is not None else before)

    def shows(self, state: Tensor) -> bool:
        """Return whether `state` is a marked state of this stream, but not the tensor that the stream keeps itself."""
        number = compat.mark_of(state)
        return number is not None and number // _POINTS * _POINTS == self._mark and state is not self._shown

    def _put(self, state: Tensor) -> None:
        self.generator.set_state(state)
        self._shown = state

    def _face(self, point: Point) -> Tensor:
        # The seed shown is the generator's own, even if the replay draws from another state.
        root = self._began if point.root is self.points[0] else point.root.state
        if point.root is point and root is not None:
            return root
        marked: Tensor = compat.marked_state(root, self._mark + point.number)
        return marked

    def _known(self, state: Tensor) -> Point | None:
        number = compat.mark_of(state)
        if number is None:
            return next((p for p in self.points if p.root is p and torch.equal(state, self._face(p))), None)
        place = number - self._mark
        if 0 <= place < len(self.points) and torch.equal(state, self._face(self.points[place])):
            return self.points[place]
        raise DeferredError("random numbers are drawn by what is no operation of torch, or by another thread")

    def _seeded(self, state: Tensor) -> Point:
        if not torch.equal(state, torch.Generator().manual_seed(self.generator.initial_seed()).get_state()):
            raise DeferredError("a generator was drawn from by another thread, or set to a state of unknown origin")
        self.points.append(Point(len(self.points), state=state, root=None))
        return self.points[-1]


def check_kept_states(streams: Iterable[Stream]) -> None:
    """Make sure that code keeps no marked state: draws after setting it later would not be random.

    Raises:
        DeferredError: code keeps one.
    """
    drawn = [stream for stream in streams if len(stream.points) > 1]
    if drawn and _finds_shown(drawn):
        # It may be in an unreachable reference cycle only.
        gc.collect()
        if _finds_shown(drawn):
            raise DeferredError("a generator's state is kept, which was asked for after a draw")


def _finds_shown(streams: list[Stream]) -> bool:
    """Return whether a tensor with a marked state of one of `streams` is alive."""
    # By type(), since isinstance() calls into proxy objects; there may be a million objects.
    tensors = [one for one in gc.get_objects() if type(one) is Tensor]
    return any(is_marked(one) and any(stream.shows(one) for stream in streams) for one in tensors)


def is_marked(one: Any) -> bool:
    """Return whether `one` is a tensor with a marked generator state."""
    if type(one) is not Tensor or one.dtype != torch.uint8 or one.layout is not torch.strided:
        return False
    return one.device.type == "cpu" and one.shape == _state_shape() and compat.mark_of(one) is not None


@functools.cache
def _state_shape() -> torch.Size:
    return torch.Generator().get_state().shape


class Draw:
    """A draw on the tape: its stream, and the states before and after it."""

    __slots__ = ("after", "before", "stream")

    def __init__(self, stream: Stream, place: int) -> None:
        self.stream = stream
        self.before, self.after = stream.draw(place)


class Course:
    """The states of generators while a tape is replayed.

    Args:
        keep: whether to keep every state on the way, so that later replays can draw from it.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._at: dict[Stream, Point] = {}

    def before(self, draw: Draw) -> None:
        """Set the generator to the state before `draw`."""
        if self._at.get(draw.stream) is not draw.before:
            state = draw.before.state
            if state is None:
                raise DeferredError("a draw comes before the one that leads to it")
            draw.stream.generator.set_state(state)

    def after(self, draw: Draw) -> None:
        """Record that `draw` was made."""
        self._at[draw.stream] = draw.after
        if self._keep or draw.after.kept or draw.after is draw.stream.current:
            draw.after.state = draw.stream.generator.get_state()

    @property
    def streams(self) -> list[Stream]:
        """The streams that were drawn from."""
        return list(self._at)
