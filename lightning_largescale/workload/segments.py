"""Assign operations to the segments of a step, and track each segment's live bytes at entry, peak and exit."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_largescale import compat
from lightning_largescale.workload.workload import Segment


@dataclass(slots=True)
class Phase:
    """One direction of one segment while it is traced; bytes and FLOPs as in `Segment`.

    Fields named "own" leave out the copies of parameters that casts made.
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
        """Update the peaks with the bytes that are live now; `own` leaves out copies of parameters."""
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

    Autograd numbers its nodes as they are made. The log records intervals of numbers with the segment that was running;
    a backward operation belongs to the segment whose interval holds its node's number. Nodes made during backward
    (a gradient of a gradient, reentrant checkpoints) belong to the segment whose backward made them.
    """

    def __init__(self) -> None:
        self.segments: list[OpenSegment] = []
        self._starts: list[int] = []
        self._owners: list[int] = []
        self._pending = compat.sequence_number()
        self._index: int | None = None  # of the segment whose forward is running; None: the next operation opens one
        self._latest: int | None = None  # of the segment whose backward ran last
        self._active: Phase | None = None
        self.in_backward = False

    def enter_block(self, name: str) -> None:
        """Begin the forward of the block `name`; do nothing in backward, where recomputation runs it again."""
        if compat.current_node_sequence() is None:
            self._pending = compat.sequence_number()
            self._index = self._open(name)

    def leave_block(self) -> None:
        """End the forward of the running block; do nothing in backward."""
        if compat.current_node_sequence() is None:
            self._pending = compat.sequence_number()
            self._index = None

    @property
    def block(self) -> str | None:
        """Name of the block whose forward is running; None outside of blocks."""
        return None if self._index is None else self.segments[self._index].block

    def current(self) -> OpenSegment:
        """Return the segment whose forward is running; open one outside of blocks if there is none."""
        if self._index is None:
            self._index = self._open(None)
        return self.segments[self._index]

    def complete(self, key: int, size: int) -> None:
        """Record that the gradient of the parameter `key`, of `size` bytes, exists."""
        if self._latest is not None:
            segment = self.segments[self._latest]
            segment.completed.append(key)
            segment.backward.gradients += size

    def phase(self, live: int, own: int) -> Phase:
        """Return the phase that the operation about to run belongs to.

        Args:
            live: bytes that are live now.
            own: the same without copies of parameters.
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
        """Close the active phase, with `live` bytes left; `own` leaves out copies of parameters."""
        if self._active is not None:
            self._active.exit, self._active.own_exit = live, own

    def assume_saved(self) -> None:
        """Count what each forward left alive as saved, for steps whose saved tensors cannot be watched."""
        for segment in self.segments:
            segment.saved = max(0, segment.forward.exit - (segment.forward.entry or 0))

    def finished(self, names: Mapping[int, str] = {}) -> tuple[Segment, ...]:
        """Return all segments; one whose backward ran no operation has the exit bytes of the next one's backward.

        Args:
            names: parameter names, by the keys passed to `complete`.
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
        """Assign the nodes numbered from the last operation on to segment `index`."""
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
        # AccumulateGrad nodes have the largest possible number, and no segment of their own.
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
