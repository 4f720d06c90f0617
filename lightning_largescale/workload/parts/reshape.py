"""Where a division goes when a tensor is viewed in another shape: arithmetic alone.

Source: torch.distributed.tensor, `propagate_shape_and_sharding`, which does the same for divisions in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_largescale.workload.parts.part import Part


def reshaped(part: Part, shape: Sequence[int], target: Sequence[int], ranks: int) -> Part | None:
    """The part of a tensor viewed as `target` that the local tensor, viewed alike, is; None where it is none.

    Args:
        part: of the tensor as it is.
        shape: of the whole tensor as it is.
        target: of the whole tensor as it is viewed, without -1.
        ranks: how many it is divided among.
    """
    for inputs, outputs in _groups(shape, target):
        if part.dim in inputs:
            return _within(part, [shape[dim] for dim in inputs], part.dim - inputs[0], target, outputs, ranks)
    return None


def _groups(shape: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Dimensions of either that hold the same elements, as few together as can be."""
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
    # Seen as one dimension, what is divided lies in stretches as many times as there are combinations before it.
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
