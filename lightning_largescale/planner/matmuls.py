"""Matrix products like those of a workload, few and with round edges: what the hardware's rate is worth measuring at.

Source: Williams et al. 2009, "Roofline", section 3 (a rate is reached at a size, not at any).
"""

from __future__ import annotations

import math
from collections import Counter

from lightning_largescale.workload import Parameter, Workload

_MOST_SIZES = 3
# Beyond it the rate of a product grows no more, and workloads of any batch share what was measured.
_LARGEST_EDGE = 8192


def matmul_sizes(workload: Workload) -> tuple[tuple[int, int, int], ...] | None:
    """The `(m, k, n)` that most FLOPs of a step are spent at, for `Hardware.calibrate(matmul_sizes=...)`.

    The trace knows FLOPs a segment but no products. So each matrix of a segment is taken to meet the same number of
    rows, that which explains its FLOPs: exact for a stack of linear layers and for convolutions, too many where
    attention over long sequences has most of them. Edges are rounded to powers of two, so that similar models get the
    same sizes, and what was measured for one serves the other.

    Returns:
        At most three sizes, in ascending order; None where no matrix has FLOPs, which has a cube measured.

    Source: the module's docstring.
    """
    flops: Counter[tuple[int, int, int]] = Counter()
    for block in {parameter.block for parameter in workload.parameters}:
        matrices = [p for p in workload.parameters if p.block == block and _is_factor(p)]
        rows, runs = _rows(workload, block, matrices)
        for matrix in matrices if rows else []:
            out = matrix.shape[0]
            flops[_rounded(rows), _rounded(matrix.numel / out), _rounded(out)] += int(2 * rows * runs * matrix.numel)
    heaviest = sorted(flops, key=lambda size: (-flops[size], size))[:_MOST_SIZES]
    return tuple(sorted(heaviest)) or None


def _rows(workload: Workload, block: str | None, matrices: list[Parameter]) -> tuple[float, int]:
    """Rows that meet each of a group's matrices in one run, and the number of runs; the rest of the model runs once."""
    segments = [s for step in list(workload.steps.values())[:1] for s in step.segments if s.block == block]
    runs = len(segments) if block is not None else 1
    weights = sum(matrix.numel for matrix in matrices)
    if not weights or not runs:
        return 0.0, 0
    return sum(segment.forward_flops for segment in segments) / runs / (2 * weights), runs


def _is_factor(parameter: Parameter) -> bool:
    """Whether it is a factor of products: tables of embeddings are looked up, unless the head is tied to them."""
    return len(parameter.shape) > 1 and parameter.numel > 0 and (not parameter.embedding or bool(parameter.aliases))


def _rounded(edge: float) -> int:
    return int(min(_LARGEST_EDGE, max(1, 2 ** round(math.log2(edge)))))
