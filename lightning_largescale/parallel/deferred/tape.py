"""A tape of recorded operations on tensors, and plans of the operations that given values need.

The tape stores a tensor as a place in a storage, so views need no operation. A plan follows the needed bytes backwards
through the tape: an operation runs if it writes some of them, and then the bytes that it reads are needed too.

Source: liveness analysis, as in Aho et al. 2006, "Compilers: Principles, Techniques, and Tools", section 9.2.5.
"""

from __future__ import annotations

import heapq
import weakref
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.parallel.deferred.draws import Draw, Point
from lightning_largescale.parallel.deferred.settings import Settings
from lightning_largescale.parallel.deferred.spans import Span, Spans, meets, union, without


class Cell:
    """A storage that has no values yet.

    Attributes:
        storage: the stand-in on the meta device, kept alive so that its id stays unique.
        writers: places on the tape of the operations that write into the storage, in order.
        known: the place of one of these and the values after it, if they were read.
        arrays: weak references to arrays handed to code that share memory with the values.
    """

    __slots__ = ("arrays", "known", "nbytes", "number", "storage", "writers")

    def __init__(self, storage: torch.UntypedStorage, number: int) -> None:
        self.storage, self.number, self.nbytes = storage, number, storage.nbytes()
        self.writers: list[int] = []
        self.known: tuple[int, torch.UntypedStorage] | None = None
        self.arrays: list[weakref.ref[Any]] = []

    @property
    def last(self) -> int:
        """Place of the last operation that writes into the cell; -1 if there is none."""
        return self.writers[-1] if self.writers else -1


@dataclass(frozen=True)
class Held:
    """A tensor described by its place in a cell."""

    cell: Cell
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conjugate: bool
    negative: bool
    requires_grad: bool

    @cached_property
    def span(self) -> Span:
        """The bytes from the tensor's first element to its last, including gaps."""
        if 0 in self.size:
            return 0, 0
        width = self.dtype.itemsize
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return self.offset * width, (self.offset + last + 1) * width

    @cached_property
    def dense(self) -> bool:
        """Return whether the tensor has every byte of its span exactly once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def among(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor at this place of `storage`."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.conjugate:
            tensor = torch.ops.aten._conj(tensor)
        return torch.ops.aten._neg_view(tensor) if self.negative else tensor

    def is_same(self, other: Held) -> bool:
        """Return whether `other` has the same cell and layout."""
        return self.cell is other.cell and self.layout == other.layout

    @property
    def layout(self) -> tuple[Any, ...]:
        """The tensor's place in the cell."""
        return (self.size, self.stride, self.offset, self.dtype, self.conjugate, self.negative)


@dataclass
class Operation:
    """A call of `func` whose arguments hold `Held` in place of tensors.

    Attributes:
        reads: the bytes that it reads, including those that it updates.
        writes: the bytes that it writes, and whether it overwrites them completely.
        makes: the new tensors that it returns, with their index among its results.
        touches: the cells of all its arguments and results.
        settings: torch's settings when it was called.
        draw: its draw of random numbers, if any.
        grad: whether grad mode was enabled then; None for operators below autograd.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    reads: list[tuple[Cell, Span]]
    writes: list[tuple[Cell, Span, bool]]
    makes: list[tuple[int, Held]]
    touches: list[Cell]
    settings: Settings
    draw: Draw | None = None
    grad: bool | None = None


Taker = Callable[[Any], None]


@dataclass
class ReplayStep:
    """The actions at one place of the tape, in the order of the fields.

    Attributes:
        whole: the freed cells of which every byte is valid at this place.
    """

    place: int
    runs: bool
    loads: list[Cell]
    takers: list[tuple[Held, Taker]]
    frees: list[Cell]
    whole: set[Cell]


@dataclass
class Tape:
    """Recorded operations in order.

    Attributes:
        cells: cells by the id of their stand-ins.
    """

    operations: list[Operation] = field(default_factory=list)
    cells: dict[int, Cell] = field(default_factory=dict)

    def cell(self, tensor: Tensor) -> Cell | None:
        """Return the cell of `tensor`; None if it is not on the tape."""
        return self.cells.get(id(tensor.untyped_storage())) if tensor.is_meta else None

    def add_cell(self, tensor: Tensor) -> Cell:
        """Add a cell whose stand-in is the storage of `tensor`; return it."""
        storage = tensor.untyped_storage()
        cell = self.cells[id(storage)] = Cell(storage, len(self.cells))
        return cell

    def held(self, tensor: Tensor) -> Held:
        """Return the place of `tensor`, which must have a cell."""
        cell = self.cells[id(tensor.untyped_storage())]
        return Held(
            cell,
            tuple(tensor.size()),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
            tensor.requires_grad,
        )

    def append(self, operation: Operation) -> None:
        """Append `operation`, and add its place to the cells that it writes."""
        place = len(self.operations)
        self.operations.append(operation)
        for cell in {id(cell): cell for cell in _written(operation)}.values():
            cell.writers.append(place)

    def plan(self, wanted: list[tuple[Held, Taker]], states: list[Point], *, whole_bytes: int = 0) -> list[ReplayStep]:
        """Return the minimal steps, in order, that lead to the wanted values and generator states.

        Args:
            wanted: tensors, each with the function to call with its values.
            states: the generator states.
            whole_bytes: cells of up to this many bytes are computed in full, if at all.
        """
        planner = _Planner(self.operations, whole_bytes)
        for held, taker in wanted:
            planner.want_value(held, taker)
        for point in states:
            planner.want_state(point)
        return planner.plan()


def _written(operation: Operation) -> list[Cell]:
    return [cell for cell, _, _ in operation.writes] + [held.cell for _, held in operation.makes]


class _Planner:
    """Makes a plan by following the needed operations backwards."""

    def __init__(self, operations: list[Operation], whole_bytes: int) -> None:
        self._operations, self._whole_bytes = operations, whole_bytes
        self._needed: dict[Cell, Spans] = {}
        self._takers: dict[int, list[tuple[Held, Taker]]] = {}
        self._draws: set[int] = set()
        self._queue: list[int] = []
        self._queued: set[int] = set()

    def want_value(self, held: Held, taker: Taker) -> None:
        """Schedule `taker` right after the last write into `held`."""
        places = reversed(held.cell.writers)
        place = next((place for place in places if self._writes(place, held.cell, held.span)), -1)
        self._takers.setdefault(place, []).append((held, taker))
        if place >= 0:
            self._push(place)

    def want_state(self, point: Point) -> None:
        """Schedule the draw that leads to `point`, unless its state is known."""
        if point.state is None and point.made_by is not None:
            self._draws.add(point.made_by)
            self._push(point.made_by)

    def plan(self) -> list[ReplayStep]:
        """Return the steps, first to last."""
        steps: list[ReplayStep] = []
        while self._queue:
            steps += self._step(-heapq.heappop(self._queue))
        if untouched := self._takers.pop(-1, []):
            steps.append(ReplayStep(-1, False, [], untouched, [held.cell for held, _ in untouched], set()))
        return steps[::-1]

    def _step(self, place: int) -> list[ReplayStep]:
        operation = self._operations[place]
        written = _written(operation)
        takers = self._takers.pop(place, [])
        frees = [cell for cell in operation.touches if not self._needed.get(cell)]
        computed = [held for held, _ in takers if assigned(operation, held) is None]
        for held in computed:
            self._need(held.cell, held.span, place)
        loads = [c for c in written if c.known is not None and c.known[0] == place and self._needed.get(c)]
        for cell in loads:
            self._needed[cell] = []
        runs = place in self._draws or any(self._writes(place, cell, None) for cell in written)
        if runs:
            self._run(operation, place)
        for cell in written:
            if self._needed.get(cell):
                self._push_writer(cell, place)
        right = {held.cell for held in computed}
        if runs:
            right |= {cell for cell, _ in operation.reads}.difference(written)
        whole = {cell for cell in right.intersection(frees) if cell.nbytes <= self._whole_bytes}
        return [ReplayStep(place, runs, loads, takers, frees, whole)] if runs or loads or takers else []

    def _run(self, operation: Operation, place: int) -> None:
        for _, held in operation.makes:
            self._needed[held.cell] = []
        for cell, span, whole in operation.writes:
            if whole and cell in self._needed:
                self._needed[cell] = without(self._needed[cell], span)
        for cell, span in operation.reads:
            self._need(cell, span, place)
        if operation.draw is not None:
            self.want_state(operation.draw.before)

    def _writes(self, place: int, cell: Cell, span: Span | None) -> bool:
        """Return whether the operation writes bytes of `cell` within `span`; needed bytes if `span` is None."""
        needed = self._needed.get(cell, []) if span is None else [span]
        operation = self._operations[place]
        made = any(held.cell is cell for _, held in operation.makes)
        return (made and bool(needed)) or any(to is cell and meets(needed, part) for to, part, _ in operation.writes)

    def _need(self, cell: Cell, span: Span, before: int) -> None:
        span = (0, cell.nbytes) if cell.nbytes <= self._whole_bytes else span
        self._needed[cell] = union(self._needed.get(cell, []), span)
        self._push_writer(cell, before)

    def _push_writer(self, cell: Cell, before: int) -> None:
        index = bisect_left(cell.writers, before)
        if index:
            self._push(cell.writers[index - 1])

    def _push(self, place: int) -> None:
        if place not in self._queued:
            self._queued.add(place)
            heapq.heappush(self._queue, -place)


def read_source(out: Tensor, source: Any) -> None:
    """Read the values of `source` into `out`."""
    source.read(out)


def assigned(operation: Operation, held: Held) -> Any:
    """Return the source from which `operation` reads exactly the values of `held`; None for any other operation."""
    if operation.func is not read_source or not operation.args[0].is_same(held):
        return None
    return operation.args[1]
