"""An optimizer's parameters in pages: stretches of elements that are stepped on at once.

The state of a parameter lies in one stretch, key by key, so that it stays a tensor of the parameter's shape; a large
parameter is cut into several pages, small ones share one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_largescale.pageable import Kind
from lightning_largescale.tiers import ALIGNMENT_BYTES, PAGE_BYTES, aligned

# Pages end at multiples of it, whatever the size of an element: O_DIRECT takes any stretch, and kernels that treat the
# rest of a vector apart have none in the middle of a parameter.
_STRIDE = ALIGNMENT_BYTES


@dataclass(frozen=True, eq=False, slots=True)
class ParamEntry:
    """A parameter, and which group of its optimizer it is in.

    Attributes:
        parameter: of the optimizer, divided among ranks or not.
        group: the number of its group.
        kind: of its state.
        label: parameters with different ones are never in the same page.
    """

    parameter: Tensor
    group: int
    kind: Kind
    label: str = ""

    @property
    def local(self) -> Tensor:
        """What this rank has of it, sharing storage."""
        return local_of(self.parameter.detach())

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of its shape in the order of its memory, as torch makes the state of a parameter."""
        local = self.local
        return tensor if local.is_contiguous() else tensor.as_strided(local.shape, _dense_strides(local))


@dataclass(frozen=True, eq=False, slots=True)
class ParamSlice:
    """Elements of a parameter in a page.

    Attributes:
        entry: the parameter.
        start: its first element here, of this rank's part.
        stop: the one after its last.
        at: where the first lies among the elements of the bundle.
    """

    entry: ParamEntry
    start: int
    stop: int
    at: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the parameter that this rank has."""
        return self.start == 0 and self.stop == self.entry.local.numel()


class Bundle:
    """Parameters whose state lies side by side: all they have under one key, then under the next.

    Args:
        entries: of one kind.

    Attributes:
        entries: as given.
        dtypes: of the state, by key.
        nbytes: of all of it.
    """

    def __init__(self, entries: Sequence[ParamEntry]) -> None:
        self.entries, self.dtypes = entries, entries[0].kind.dtypes
        sizes = [_padded(entry.local.numel()) for entry in entries]
        self._offsets = dict(zip(map(id, entries), itertools.accumulate(sizes, initial=0), strict=False))
        self.numel = sum(sizes)
        lengths = [aligned(self.numel * dtype.itemsize) for dtype in self.dtypes.values()]
        starts = itertools.accumulate(lengths, initial=0)
        self._starts = dict(zip(self.dtypes, starts, strict=False))
        self.nbytes = sum(lengths)

    def start_of(self, entry: ParamEntry, key: str) -> int:
        """The first byte of the state of `entry` under `key`."""
        return self._starts[key] + self._offsets[id(entry)] * self.dtypes[key].itemsize

    def stretch(self, key: str, start: int, stop: int) -> tuple[int, int]:
        """First byte, and the one after the last, of elements `start` to `stop` under `key`, as O_DIRECT takes them."""
        size = self.dtypes[key].itemsize
        return self._starts[key] + start * size, self._starts[key] + aligned(stop * size)

    def pages(self, moved_bytes: int) -> Iterator[Page]:
        """The pages that it is cut into.

        Args:
            moved_bytes: of a parameter's element, beside its state, that are elsewhere too.
        """
        length = max(_STRIDE, PAGE_BYTES // max(1, moved_bytes + self.entries[0].kind.bytes_per_element))
        length = length // _STRIDE * _STRIDE if len(self.entries) == 1 and self.entries[0].kind.divisible else 0
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
    """Elements of a bundle that are stepped on at once.

    Attributes:
        bundle: whose they are.
        start: the first.
        stop: the one after the last.
        slices: of parameters, in it.
    """

    bundle: Bundle
    start: int
    stop: int
    slices: tuple[ParamSlice, ...]

    @property
    def state_bytes(self) -> int:
        """Of the state of its elements."""
        stretches = (self.bundle.stretch(key, self.start, self.stop) for key in self.bundle.dtypes)
        return sum(stop - start for start, stop in stretches)


def bundles_of(
    entries: Sequence[ParamEntry], moved_bytes: Callable[[ParamEntry], int] = lambda entry: 0
) -> Iterator[Bundle]:
    """`entries` in bundles: a large one by itself, small ones of a kind, a group and a label together.

    Args:
        entries: of one optimizer.
        moved_bytes: of a parameter's element, beside its state, that are elsewhere too.
    """
    small: dict[object, list[ParamEntry]] = {}
    for entry in entries:
        moved = moved_bytes(entry)
        per_element = max(1, moved + entry.kind.bytes_per_element)
        nbytes = entry.local.numel() * per_element
        if not nbytes:
            continue
        if 2 * nbytes > PAGE_BYTES:
            yield Bundle([entry])
            continue
        key = (
            entry.group,
            tuple(entry.kind.dtypes.items()),
            entry.kind.divisible,
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


def local_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty_like(tensor, device="meta").stride()


def _padded(numel: int) -> int:
    """`numel` rounded up so that what comes next begins at 64 bytes, whatever its dtype."""
    return -(-numel // 64) * 64
