"""Chunks: the boxes of a full tensor that this rank holds, for files that are independent of the mesh.

A box is in the user's element order. A rank usually holds one chunk of a tensor; of a matrix that holds q, k and v side
by side, sharded by tensor parallelism, it holds one each. A rank's rows of a row-sharded table are one chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.parallel.order import as_ordered, divided_dim, has_order, order_of
from lightning_largescale.parallel.rows import mark_rows, rows_of
from lightning_largescale.workload.parts import Part, share

# The stretches of one dimension that this rank holds, as first element and length, in memory order.
_Stretches = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a full tensor.

    Attributes:
        offsets: the place of the box's first element in the full tensor, by dimension.
        values: a view of this rank's memory, with the box's shape.
    """

    offsets: tuple[int, ...]
    values: Tensor


def chunks_of(tensor: Tensor, part: Part | None = None) -> list[Chunk]:
    """Return the boxes of `tensor` that this rank holds, without empty ones; one for a tensor that is not sharded.

    Args:
        tensor: a parameter, its gradient or its state.
        part: `order_of` the parameter, if `tensor` is not marked itself.
    """
    if not isinstance(tensor, DTensor):
        rows = rows_of(tensor)
        offsets = (0,) * tensor.dim() if rows is None else (rows.start, *(0,) * (tensor.dim() - 1))
        return [Chunk(offsets, tensor.detach())] if tensor.numel() else []
    part = part or order_of(tensor)
    dims: list[_Stretches] = [[(0, size)] for size in tensor.shape]
    mesh = tensor.device_mesh
    for axis, placement in reversed([*enumerate(tensor.placements)]):
        dim = divided_dim(placement)
        if dim is None:
            continue
        ordered = axis == mesh.ndim - 1 and has_order(part, tensor)
        sizes = part.pieces if part is not None and ordered else (_length(dims[dim]),)
        rank, ranks, start, taken = mesh.get_local_rank(axis), mesh.size(axis), 0, []
        for size in sizes:
            offset, length = share(size, rank, ranks)
            taken += _within(dims[dim], start + offset, length)
            start += size
        dims[dim] = taken
    return [*_boxes(tensor.to_local().detach(), dims)]


def empty_part(
    like: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, own: Tensor | None = None
) -> Tensor:
    """Return uninitialized memory for this rank's shard of a tensor that is sharded, and marked, as `like`.

    Args:
        like: a parameter, sharded or not, on any device.
        dtype: the dtype; None for that of `like`.
        device: the device; None for that of `like`.
        own: the shard's memory; None to allocate it.
    """
    local = local_of(like)
    if own is None:
        device = local.device if device is None else device
        own = torch.empty_strided(local.shape, local.stride(), dtype=dtype or like.dtype, device=device)
    if not isinstance(like, DTensor):
        rows = rows_of(like)
        return own if rows is None else mark_rows(own, rows)
    whole: DTensor = compat.divided_as(like, own)
    return as_ordered(whole, order_of(like))


def write_part(tensor: Tensor, whole: Tensor) -> None:
    """Write this rank's slice of the full tensor `whole` into the shard `tensor`."""
    for chunk in chunks_of(tensor):
        box = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.values.shape, strict=True)]
        chunk.values.copy_(whole.detach()[tuple(box)])


def in_boxes(chunk: Chunk, limit_bytes: int) -> Iterator[Chunk]:
    """Split `chunk` along its first dimensions into boxes of at most `limit_bytes`, or of one element."""
    values = chunk.values
    dim = next((dim for dim, size in enumerate(values.shape) if size > 1), None)
    if values.nbytes <= limit_bytes or dim is None:
        yield chunk
        return
    rows = max(1, limit_bytes * values.shape[dim] // values.nbytes)
    for start in range(0, values.shape[dim], rows):
        length = min(rows, values.shape[dim] - start)
        offsets = tuple(offset + start * (axis == dim) for axis, offset in enumerate(chunk.offsets))
        yield from in_boxes(Chunk(offsets, values.narrow(dim, start, length)), limit_bytes)


def _boxes(local: Tensor, dims: Sequence[_Stretches]) -> Iterator[Chunk]:
    """Yield the boxes of `local`, whose dimensions consist of the stretches `dims`."""
    held = [[*_places(dim)] for dim in dims]
    for box in itertools.product(*held):
        values = local
        for axis, (own, _, length) in enumerate(box):
            values = values.narrow(axis, own, length)
        if math.prod(values.shape):
            yield Chunk(tuple(start for _, start, _ in box), values)


def _places(stretches: _Stretches) -> Iterator[tuple[int, int, int]]:
    """Yield, for each stretch, its first element in the shard and in the full tensor, and its length."""
    own = 0
    for start, length in stretches:
        yield own, start, length
        own += length


def _within(stretches: _Stretches, start: int, length: int) -> _Stretches:
    """Return the stretches of the elements from `start` to `start + length` of the shard."""
    found: _Stretches = []
    before = 0
    for first, size in stretches:
        low, high = max(start - before, 0), min(start + length - before, size)
        if low < high:
            found.append((first + low, high - low))
        before += size
    return found


def _length(stretches: _Stretches) -> int:
    return sum(length for _, length in stretches)


def is_divided(tensor: object) -> bool:
    """Return whether `tensor` is a shard or rows of a row-sharded table."""
    return isinstance(tensor, DTensor) or rows_of(tensor) is not None
