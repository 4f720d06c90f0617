"""Closed-form estimates, from the parameters alone, of a step that cannot be run."""

from __future__ import annotations

from torch import nn

from lightning_largescale.workload.batch import batch_samples, tensors_in
from lightning_largescale.workload.blocks import find_blocks, find_groups
from lightning_largescale.workload.steps import Traced, TraceRequest
from lightning_largescale.workload.workload import Segment, Step

_ITEM_BYTES = {"32-true": 4, "bf16-mixed": 2, "16-mixed": 2, "bf16-true": 2, "16-true": 2, "64-true": 8}
# Multiple of a matrix's output that is saved beside its input: for itself, and for an activation function or
# normalization after it.
_KEPT_OF_OUTPUT = 2


def estimate(request: TraceRequest, why: str) -> Traced:
    """Estimate the step from matrix shapes and the number of positions in the batch.

    Each matrix multiplies every position once: `2 * numel` FLOPs forward and twice that backward. Its input and twice
    its output are saved.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1: 2 N FLOPs a token, and twice
        that in backward.
    """
    positions = _positions(request.batch)
    step = _step(request, positions, find_blocks(request.module))
    names = [name for name, parameter in request.module.named_parameters() if parameter.requires_grad]
    how = f"{why}; its needs are estimated from the shapes of the parameters at {positions} positions a batch"
    return Traced(step=step, used=frozenset(names if request.trains else ()), approximate=(how,))


def _positions(batch: object) -> int:
    """Return the elements of the largest integer tensor (its tokens), or the samples if these are more."""
    integers = [
        tensor.numel() for tensor in tensors_in(batch) if not tensor.is_floating_point() and not tensor.is_complex()
    ]
    return max([*integers, batch_samples(batch)])


def _step(request: TraceRequest, positions: int, blocks: dict[str, nn.Module]) -> Step:
    module = request.module
    shapes = dict(module.named_parameters())
    groups = find_groups(module)
    tables = {id(child.weight) for child in module.modules() if isinstance(child, (nn.Embedding, nn.EmbeddingBag))}
    segments: list[Segment] = []
    live = 0
    for name in (*blocks, ""):
        own = [shapes[parameter] for parameter in groups[name].parameters]
        matrices = [parameter for parameter in own if parameter.dim() > 1 and id(parameter) not in tables]
        saved, entering = _saved(matrices, positions, _ITEM_BYTES[request.precision])
        saved = saved if request.trains else 0
        flops = 2 * positions * sum(matrix.numel() for matrix in matrices)
        segments.append(_segment(name or None, flops, saved, entering, live, request.trains))
        live += saved
    tail = segments[-1]
    return Step(
        precision=request.precision,
        segments=tuple(segments),
        largest_temporary_bytes=max((segment.input_bytes for segment in segments), default=0),
        loss_peak_bytes=max(tail.forward_peak_bytes, tail.backward_peak_bytes),
    )


def _saved(matrices: list[nn.Parameter], positions: int, item_bytes: int) -> tuple[int, int]:
    """Return the bytes that a segment saves, and the bytes of its widest input."""
    inputs = [positions * item_bytes * matrix[0].numel() for matrix in matrices]
    outputs = [positions * item_bytes * matrix.shape[0] for matrix in matrices]
    return sum(inputs) + _KEPT_OF_OUTPUT * sum(outputs), max(inputs, default=0)


def _segment(block: str | None, flops: int, saved: int, entering: int, live: int, trains: bool) -> Segment:
    moved = 2 * saved or 2 * entering
    return Segment(
        block=block,
        forward_flops=flops,
        backward_flops=2 * flops if trains else 0,
        forward_moved_bytes=moved,
        backward_moved_bytes=2 * moved if trains else 0,
        input_bytes=entering if block else 0,
        saved_bytes=saved,
        forward_entry_bytes=live,
        forward_peak_bytes=live + saved + entering,
        forward_exit_bytes=live + saved,
        backward_entry_bytes=live + saved if trains else 0,
        backward_peak_bytes=live + saved + 2 * entering if trains else 0,
        backward_exit_bytes=live if trains else 0,
    )
