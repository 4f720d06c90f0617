"""Matrix-product sizes that represent a workload, few and rounded, at which to measure the hardware's rate.

Source: Williams et al. 2009, "Roofline", section 3 (a rate is reached at a size, not at any).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_largescale.workload import Parameter, Workload


_MOST_SIZES = 3
# Beyond this edge the rate no longer grows, so that workloads of any batch share one measurement.
_LARGEST_EDGE = 8192


def matmul_sizes(workload: Workload) -> tuple[tuple[int, int, int], ...] | None:
    """Return the `(m, k, n)` that take most FLOPs of a step, for `Hardware.calibrate(matmul_sizes=...)`.

    The trace has the FLOPs of a segment, not its products. So every matrix of a segment is assumed to multiply the same
    number of rows, the number that explains the segment's FLOPs. This is exact for a stack of linear layers and for
    convolutions, and too many rows if attention over long sequences has most of the FLOPs. Edges are rounded to powers
    of two, so that similar models share sizes and measurements.

    Returns:
        At most three sizes, in ascending order; None if no matrix has FLOPs, so that a cube is measured.

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
    """Return the rows that each matrix of a group multiplies in one run, and the number of runs.

    The rest of the model, outside of blocks, runs once.
    """
    segments = [s for step in list(workload.steps.values())[:1] for s in step.segments if s.block == block]
    runs = len(segments) if block is not None else 1
    weights = sum(matrix.numel for matrix in matrices)
    if not weights or not runs:
        return 0.0, 0
    return sum(segment.forward_flops for segment in segments) / runs / (2 * weights), runs


def _is_factor(parameter: Parameter) -> bool:
    """Return whether a parameter is a factor of matrix products, as embeddings are only if the head is tied to them."""
    return len(parameter.shape) > 1 and parameter.numel > 0 and (not parameter.embedding or bool(parameter.aliases))


def _rounded(edge: float) -> int:
    return int(min(_LARGEST_EDGE, max(1, 2 ** round(math.log2(edge)))))
