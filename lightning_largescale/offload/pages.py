"""Pages of an optimizer's parameters: ranges of elements that are stepped on together.

Each state tensor of a parameter is contiguous in memory, so it keeps the parameter's shape. State is laid out key by
key. A large parameter is split into several pages; small parameters share a page.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_largescale.dtensors import local_of
from lightning_largescale.optimizers.state_spec import StateSpec
from lightning_largescale.tiers import ALIGNMENT_BYTES, PAGE_BYTES, aligned

# Pages end at multiples of this many elements, for every element size. So any range is aligned for O_DIRECT, and
# vectorized kernels have no remainder loop in the middle of a parameter.
_STRIDE = ALIGNMENT_BYTES


@dataclass(frozen=True, eq=False, slots=True)
class ParamEntry:
    """A parameter and its group in the optimizer.

    Attributes:
        parameter: The optimizer's parameter, sharded among ranks or not.
        group: The number of its group.
        spec: The kind of its state.
        label: Its label. Parameters with different labels never share a page.
    """

    parameter: Tensor
    group: int
    spec: StateSpec
    label: str = ""

    @property
    def local(self) -> Tensor:
        """The local shard of the parameter, sharing storage with it."""
        return local_of(self.parameter.detach())

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return a contiguous tensor of the local shard's shape with its memory order, as torch lays out state."""
        local = self.local
        return tensor if local.is_contiguous() else tensor.as_strided(local.shape, _dense_strides(local))


@dataclass(frozen=True, eq=False, slots=True)
class ParamSlice:
    """The elements of one parameter in a page.

    Attributes:
        entry: The parameter.
        start: The first element, as an index into the flat local shard.
        stop: The index after the last element.
        at: The index of the first element among those of the bundle.
    """

    entry: ParamEntry
    start: int
    stop: int
    at: int

    @property
    def whole(self) -> bool:
        """Return whether the slice is the full local shard."""
        return self.start == 0 and self.stop == self.entry.local.numel()


class Bundle:
    """Parameters whose state is adjacent in memory: all of it under one key, then all of it under the next.

    Args:
        entries: Parameters whose state is of the same kind.

    Attributes:
        entries: The parameters.
        dtypes: The dtype of the state, by key.
        nbytes: The bytes of the state, under all keys.
    """

    def __init__(self, entries: Sequence[ParamEntry]) -> None:
        self.entries, self.dtypes = entries, entries[0].spec.dtypes
        sizes = [_padded(entry.local.numel()) for entry in entries]
        self._offsets = dict(zip(map(id, entries), itertools.accumulate(sizes, initial=0), strict=False))
        self.numel = sum(sizes)
        lengths = [aligned(self.numel * dtype.itemsize) for dtype in self.dtypes.values()]
        starts = itertools.accumulate(lengths, initial=0)
        self._starts = dict(zip(self.dtypes, starts, strict=False))
        self.nbytes = sum(lengths)

    def start_of(self, entry: ParamEntry, key: str) -> int:
        """Return the first byte of the state of `entry` under `key`."""
        return self._starts[key] + self._offsets[id(entry)] * self.dtypes[key].itemsize

    def stretch(self, key: str, start: int, stop: int) -> tuple[int, int]:
        """Return the first byte, and the byte after the last, of elements `start` to `stop` under `key`, aligned for
        O_DIRECT.
        """
        size = self.dtypes[key].itemsize
        return self._starts[key] + start * size, self._starts[key] + aligned(stop * size)

    def pages(self, moved_bytes: int) -> Iterator[Page]:
        """Yield the pages of the bundle.

        Args:
            moved_bytes: Offloaded bytes per element of a parameter, besides its state.
        """
        length = max(_STRIDE, PAGE_BYTES // max(1, moved_bytes + self.entries[0].spec.bytes_per_element))
        length = length // _STRIDE * _STRIDE if len(self.entries) == 1 and self.entries[0].spec.elementwise else 0
        for start in range(0, self.numel, length or max(1, self.numel)):
            stop = min(self.numel, start + length) if length else self.numel
            yield Page(self, start, stop, tuple(self._pieces(start, stop)))

    def _pieces(self, start: int, stop: int) -> Iterator[ParamSlice]:
        for entry in self.entries:
            offset, numel = self._offsets[id(entry)], entry.local.numel()
            first, last = max(0, start - offset), min(numel, stop - offset)
            if first < last:
                yield ParamSlice(entry, first, last, offset + first)


@dataclass(frozen=True, eq=False, slots=True)
class Page:
    """Elements of a bundle that are stepped on together.

    Attributes:
        bundle: The bundle.
        start: The first element.
        stop: The element after the last.
        slices: The slices of parameters in the page.
    """

    bundle: Bundle
    start: int
    stop: int
    slices: tuple[ParamSlice, ...]

    @property
    def state_bytes(self) -> int:
        """The bytes of the state of the page's elements."""
        stretches = (self.bundle.stretch(key, self.start, self.stop) for key in self.bundle.dtypes)
        return sum(stop - start for start, stop in stretches)


def bundles_of(
    entries: Sequence[ParamEntry], moved_bytes: Callable[[ParamEntry], int] = lambda entry: 0
) -> Iterator[Bundle]:
    """Yield `entries` in bundles: a large one alone, small ones together if kind, group, label, dtype, device and moved
    bytes agree.

    Entries whose local shard is empty are left out.

    Args:
        entries: Parameters of one optimizer.
        moved_bytes: Function that returns the offloaded bytes per element of a parameter, besides its state.
    """
    small: dict[object, list[ParamEntry]] = {}
    for entry in entries:
        moved = moved_bytes(entry)
        per_element = max(1, moved + entry.spec.bytes_per_element)
        nbytes = entry.local.numel() * per_element
        if not nbytes:
            continue
        if 2 * nbytes > PAGE_BYTES:
            yield Bundle([entry])
            continue
        key = (
            entry.group,
            tuple(entry.spec.dtypes.items()),
            entry.spec.elementwise,
            entry.label,
            entry.local.dtype,
            entry.local.device,
            moved,
        )
        held = small.setdefault(key, [])
        if held and sum(_padded(one.local.numel()) for one in held) * per_element + nbytes > PAGE_BYTES:
            yield Bundle(held)
            small[key] = held = []
        held.append(entry)
    yield from map(Bundle, filter(None, small.values()))


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()


def _padded(numel: int) -> int:
    """Round `numel` up to a multiple of 64, so that the next parameter begins at a multiple of 64 bytes for any
    dtype.
    """
    return -(-numel // 64) * 64
