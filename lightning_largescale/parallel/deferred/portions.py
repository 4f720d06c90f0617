"""Make large draws portion by portion, so that no rank holds a full table of many gigabytes to keep some of its rows.

The numbers equal those of one draw: torch's CPU generator yields them in order, normal ones in blocks of 16.

Source: torch's `normal_fill` of aten/src/ATen/native/cpu/DistributionTemplates.h, whose blocks these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.parallel.chunks import Chunk, chunks_of, write_part
from lightning_largescale.parallel.deferred.tape import Held, Operation

# Draws of more than LARGE_BYTES are made in portions of PORTION elements: a multiple of the normal numbers' block size.
LARGE_BYTES, PORTION = 64 * 2**20, 2**20
_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
_DTYPES = (torch.float32, torch.float64)


def in_portions(operation: Operation) -> Held | None:
    """Return the target of `operation` if it is a draw that fills a large storage and can be made in portions."""
    if operation.func not in _DRAWS or operation.grad is not None:
        return None
    target = operation.args[0]
    whole = isinstance(target, Held) and target.span == (0, target.cell.nbytes) and target.stride == _strides(target)
    large = whole and target.cell.nbytes > LARGE_BYTES and target.dtype in _DTYPES
    return target if large and not (target.conjugate or target.negative) else None


class Portions:
    """A source for the values of a large draw, made when they are read, once.

    Args:
        target: the tensor to draw.
        draw: draws into the tensor that it receives.
    """

    def __init__(self, target: Held, draw: Callable[[Tensor], Any]) -> None:
        self._target, self._draw = target, draw
        self._drawn = False

    def read(self, out: Tensor) -> None:
        """Draw, and write this rank's shard into `out`."""
        chunks = chunks_of(out)
        self._drawn = True
        if not all(self._is_rows(chunk) for chunk in chunks):
            whole = torch.empty(self._target.size, dtype=self._target.dtype, device="cpu")
            self._draw(whole)
            write_part(out, whole)
            return
        row = math.prod(self._target.size[1:])
        kept = [(chunk.offsets[0] * row, chunk.values.view(-1)) for chunk in chunks]
        for start, portion in self._portions():
            for first, values in kept:
                low, high = max(first, start), min(first + len(values), start + len(portion))
                if low < high:
                    values[low - first : high - first].copy_(portion[low - start : high - start])

    def finish(self) -> None:
        """Draw if nothing was read, since the generator has to advance anyway."""
        if not self._drawn:
            for _ in self._portions():
                pass

    def _portions(self) -> Iterator[tuple[int, Tensor]]:
        """Draw the flat tensor in portions; yield each with the index of its first element.

        The last portion may be longer, since torch redraws the last 16 numbers if the last block is not full.
        """
        count = math.prod(self._target.size)
        start = 0
        while start < count:
            length = PORTION if count - start >= 2 * PORTION else count - start
            portion = torch.empty(length, dtype=self._target.dtype, device="cpu")
            self._draw(portion)
            yield start, portion
            start += length

    def _is_rows(self, chunk: Chunk) -> bool:
        """Return whether a chunk consists of full rows that are contiguous in memory."""
        inner = (*chunk.values.shape[1:],) == self._target.size[1:]
        return bool(chunk.offsets) and inner and not any(chunk.offsets[1:]) and chunk.values.is_contiguous()


def _strides(held: Held) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of the same size."""
    return torch.empty(held.size, device="meta").stride()
