"""Compute the sharding of a tensor that is viewed in another shape; arithmetic only.

Source: torch.distributed.tensor, `propagate_shape_and_sharding`, which does the same for shardings of one section.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_largescale.workload.parts.part import Part


def reshaped(part: Part, shape: Sequence[int], target: Sequence[int], ranks: int) -> Part | None:
    """Return the sharding of a tensor viewed as `target`; None if the viewed local tensor is not a shard of it.

    Args:
        part: the sharding of the tensor before the view.
        shape: the unsharded shape before the view.
        target: the unsharded shape of the view, without -1.
        ranks: the number of ranks.
    """
    for inputs, outputs in _groups(shape, target):
        if part.dim in inputs:
            return _within(part, [shape[dim] for dim in inputs], part.dim - inputs[0], target, outputs, ranks)
    return None


def _groups(shape: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest groups of dimensions of `shape` and `target` that hold the same elements."""
    here, there = 0, 0
    while here < len(shape) or there < len(target):
        inputs: list[int] = []
        outputs: list[int] = []
        left = right = 1
        while True:
            if here < len(shape) and (left < right or not inputs):
                inputs.append(here)
                left *= shape[here]
                here += 1
            elif there < len(target) and (right < left or not outputs):
                outputs.append(there)
                right *= target[there]
                there += 1
            else:
                break
        if left != right:
            return
        yield inputs, outputs


def _within(
    part: Part, sizes: Sequence[int], position: int, target: Sequence[int], outputs: Sequence[int], ranks: int
) -> Part | None:
    # Flattened into one dimension, the sections repeat for each combination of indices of the dimensions before.
    inner = math.prod(sizes[position + 1 :])
    pieces = tuple(piece * inner for piece in part.pieces) * math.prod(sizes[:position])
    divisible = all(piece % ranks == 0 for piece in part.pieces)
    for index, dim in enumerate(outputs):
        size = target[dim]
        rest = math.prod(target[other] for other in outputs[index + 1 :])
        if size == 1:
            continue
        if rest == 1 and size == sum(pieces) and (divisible or part.size == size):
            return Part(dim, pieces, part.origins)
        if len(pieces) == 1:
            return Part(dim, (size,), part.origins) if divisible and size % ranks == 0 else None
        if len(pieces) % size or len(set(pieces)) > 1:
            return None
        pieces = pieces[: len(pieces) // size]
    return None
