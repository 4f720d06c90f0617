"""Which part of the step an operation belongs to, and live bytes at entry, at the worst moment and at exit of each."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_largescale import compat
from lightning_largescale.workload.workload import Segment


@dataclass(slots=True)
class Phase:
    """One direction of one segment while it is traced; bytes and FLOPs as in `Segment`.

    What is "own" leaves out the copies of parameters that casts made.
    """

    entry: int | None = None
    peak: int = 0
    own_peak: int = 0
    gradients: int = 0
    peak_with_gradients: int = 0
    exit: int = 0
    own_exit: int = 0
    flops: int = 0
    moved: int = 0
    large: int = 0
    moved_copies: int = 0
    products: int = 0
    moved_products: int = 0

    def reach(self, live: int, own: int) -> None:
        """Now so much is live (bytes)."""
        self.peak = max(self.peak, live)
        self.own_peak = max(self.own_peak, own)
        self.peak_with_gradients = max(self.peak_with_gradients, live + self.gradients)


@dataclass(slots=True)
class OpenSegment:
    """A segment while it is traced."""

    block: str | None
    saved: int = 0
    saved_copies: int = 0
    inputs: int = 0
    completed: list[int] = field(default_factory=list)
    forward: Phase = field(default_factory=Phase)
    backward: Phase = field(default_factory=Phase)


class SegmentLog:
    """The segments of one step, in executed order.

    Autograd numbers its nodes as they are made. Which segment was running when a number was given out is noted as
    intervals; a backward operation belongs to the segment whose interval holds its node's number. Nodes made during
    backward (a gradient of a gradient, reentrant checkpoints) belong to the segment whose backward made them.
    """

    def __init__(self) -> None:
        self.segments: list[OpenSegment] = []
        self._starts: list[int] = []
        self._owners: list[int] = []
        self._pending = compat.sequence_number()
        self._index: int | None = None  # of the segment whose forward is running; None: the next operation opens a rest
        self._latest: int | None = None  # of the segment whose backward ran last
        self._active: Phase | None = None
        self.in_backward = False

    def enter_block(self, name: str) -> None:
        """The forward of the block `name` begins; does nothing in backward, where recomputation runs it again."""
        if compat.current_node_sequence() is None:
            self._pending = compat.sequence_number()
            self._index = self._open(name)

    def leave_block(self) -> None:
        """The forward of the block that runs ends."""
        if compat.current_node_sequence() is None:
            self._pending = compat.sequence_number()
            self._index = None

    @property
    def block(self) -> str | None:
        """Name of the block whose forward is running; None outside of blocks."""
        return None if self._index is None else self.segments[self._index].block

    def current(self) -> OpenSegment:
        """The segment whose forward is running."""
        if self._index is None:
            self._index = self._open(None)
        return self.segments[self._index]

    def complete(self, key: int, size: int) -> None:
        """The gradient of the parameter that is known by `key` is there, of so many bytes."""
        if self._latest is not None:
            segment = self.segments[self._latest]
            segment.completed.append(key)
            segment.backward.gradients += size

    def phase(self, live: int, own: int) -> Phase:
        """The phase that the operation about to run belongs to; `live` is what is live now (bytes), `own` without
        copies of parameters.
        """
        node = compat.current_node_sequence()
        if node is None:
            if self.in_backward and self._index is not None:
                self._own(self._index)
            self.in_backward = False
            phase = self.current().forward
        else:
            self.in_backward = True
            index = self._segment_of(node)
            self._latest = index
            self._own(index)
            phase = self.segments[index].backward
        self._pending = compat.sequence_number()
        self._activate(phase, live, own)
        return phase

    def close(self, live: int, own: int) -> None:
        """The step is over and `live` bytes are left."""
        if self._active is not None:
            self._active.exit, self._active.own_exit = live, own

    def assume_saved(self) -> None:
        """Take what each forward left alive as saved, where saved tensors could not be watched."""
        for segment in self.segments:
            segment.saved = max(0, segment.forward.exit - (segment.forward.entry or 0))

    def finished(self, names: Mapping[int, str] = {}) -> tuple[Segment, ...]:
        """All segments; one whose backward ran no operation has what the next one's backward left.

        Args:
            names: of parameters, by the keys of those that were completed.
        """
        left = own_left = 0
        rows: list[Segment] = []
        for segment in reversed(self.segments):
            forward, backward = segment.forward, segment.backward
            if backward.entry is None:
                backward = Phase(entry=left, peak=left, own_peak=own_left, exit=left, own_exit=own_left)
            left, own_left = backward.exit, backward.own_exit
            completed = tuple(names[key] for key in segment.completed if key in names)
            rows.append(_row(segment, forward, backward, completed))
        return tuple(reversed(rows))

    def _open(self, block: str | None) -> int:
        self.segments.append(OpenSegment(block))
        self._own(len(self.segments) - 1)
        return len(self.segments) - 1

    def _own(self, index: int) -> None:
        """Nodes numbered from the last operation on belong to segment `index`."""
        if self._owners and self._owners[-1] == index:
            return
        if self._starts and self._starts[-1] == self._pending:
            self._owners[-1] = index
        else:
            self._starts.append(self._pending)
            self._owners.append(index)

    def _segment_of(self, node: int) -> int:
        fallback = self._latest if self._latest is not None else max(0, len(self.segments) - 1)
        if not self.segments:
            self._open(None)
        # Nodes that accumulate gradients have the largest number there is, and no segment of their own.
        if node >= compat.sequence_number():
            return fallback
        place = bisect.bisect_right(self._starts, node) - 1
        return self._owners[place] if place >= 0 else fallback

    def _activate(self, phase: Phase, live: int, own: int) -> None:
        if phase is self._active:
            return
        self.close(live, own)
        if phase.entry is None:
            phase.entry = live
            phase.reach(live, own)
        self._active = phase


def _row(segment: OpenSegment, forward: Phase, backward: Phase, completed: tuple[str, ...]) -> Segment:
    return Segment(
        block=segment.block,
        forward_flops=forward.flops,
        backward_flops=backward.flops,
        forward_moved_bytes=forward.moved,
        backward_moved_bytes=backward.moved,
        forward_large_bytes=forward.large,
        backward_large_bytes=backward.large,
        input_bytes=segment.inputs,
        saved_bytes=segment.saved,
        forward_entry_bytes=forward.entry or 0,
        forward_peak_bytes=forward.peak,
        forward_exit_bytes=forward.exit,
        backward_entry_bytes=backward.entry or 0,
        backward_peak_bytes=backward.peak,
        backward_exit_bytes=backward.exit,
        saved_copy_bytes=segment.saved_copies,
        forward_copy_bytes=forward.peak - forward.own_peak,
        backward_copy_bytes=backward.peak - backward.own_peak,
        moved_copy_bytes=forward.moved_copies,
        product_bytes=forward.products,
        moved_product_bytes=forward.moved_products,
        backward_gradient_bytes=max(0, backward.peak_with_gradients - backward.peak),
        completed=completed,
    )
