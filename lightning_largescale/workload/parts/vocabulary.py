"""Rules of embedding tables and losses over a vocabulary, whose entries are sharded among the ranks.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (the embedding, and the cross entropy computed where the logits
    are).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_largescale.workload.parts.engine import OnParts, Ranks, Rule
from lightning_largescale.workload.parts.part import as_part, part_of, share


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    return {F.embedding: _embedding, F.cross_entropy: _cross_entropy}


_EMBEDDING, _CROSS_ENTROPY = inspect.signature(F.embedding), inspect.signature(F.cross_entropy)


def _embedding(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = _EMBEDDING.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    indices, weight, part = given["input"], given["weight"], part_of(given["weight"])
    if part is None or part_of(indices) is not None or len(part.pieces) > 1:
        return NotImplemented
    if given["max_norm"] is not None or given["scale_grad_by_freq"] or given["sparse"]:
        return NotImplemented
    padding = given["padding_idx"]
    if part.dim == 1:
        return as_part(func(indices, weight, padding), part.at(indices.dim()))
    engine.ranks.check(((indices >= 0) & (indices < part.size)).all(), "index out of range in self")
    start, length = share(part.size, engine.ranks.rank, engine.ranks.size)
    elsewhere = (indices < start) | (indices >= start + length)
    if padding is not None:
        padding = padding % part.size - start
        padding = padding if 0 <= padding < length else None
    found = func((indices - start).masked_fill(elsewhere, 0), weight, padding)
    return engine.reduced(found.masked_fill(elsewhere.unsqueeze(-1), 0), [part])


def _cross_entropy(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = _CROSS_ENTROPY.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    logits, target, part = given["input"], given["target"], part_of(given["input"])
    deprecated = given["size_average"] is not None or given["reduce"] is not None
    if part is None or len(part.pieces) > 1 or given["weight"] is not None or deprecated:
        return NotImplemented
    if target.dim() != logits.dim() - 1 or target.is_floating_point() or part_of(target) is not None:
        return NotImplemented
    classes = min(1, logits.dim() - 1)
    if part.dim != classes:
        return NotImplemented
    inside = (target >= 0) & (target < part.size) | (target == given["ignore_index"])
    engine.ranks.check(inside.all(), "a target is out of bounds")
    rows = logits.movedim(classes, -1).flatten(0, -2) if logits.dim() > 1 else logits.unsqueeze(0)
    kept = target.reshape(-1) != given["ignore_index"]
    losses = _VocabularyParallel.apply(  # type: ignore[no-untyped-call]
        rows if rows.dtype == torch.float64 else rows.float(),
        target.reshape(-1).masked_fill(~kept, 0),
        engine.ranks,
        part.size,
        given["label_smoothing"],
    ).masked_fill(~kept, 0)
    if not torch.is_autocast_enabled(logits.device.type):
        # Autocast computes losses in float32.
        losses = losses.to(logits.dtype)
    if given["reduction"] == "none":
        return losses.reshape(target.shape)
    return losses.sum() / kept.sum() if given["reduction"] == "mean" else losses.sum()


class _VocabularyParallel(torch.autograd.Function):
    """Cross entropy of logits of shape (rows, this rank's classes); one loss per row, equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ranks: Ranks, classes: int, smoothing: float) -> Tensor:
        start, length = share(classes, ranks.rank, ranks.size)
        elsewhere = (target < start) | (target >= start + length)
        index = (target - start).masked_fill(elsewhere, 0).unsqueeze(-1)
        if length:
            own, of_target = logits.amax(-1), logits.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0)
        else:
            own, of_target = logits.new_full(target.shape, -torch.inf), logits.new_zeros(target.shape)
        largest = ranks.maximum(own)
        exponentials = (logits - largest.unsqueeze(-1)).exp_()
        summed = [exponentials.sum(-1), of_target]
        # The sum of logits is left out without smoothing: 0 times its minus infinity, of masked logits, would be NaN.
        sums = ranks.sum(torch.stack([*summed, logits.sum(-1)] if smoothing else summed))
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), index, elsewhere)
        ctx.smoothing, ctx.classes = smoothing, classes
        loss = sums[0].log() + largest
        loss = loss - (1 - smoothing) * sums[1]
        return loss - smoothing / classes * sums[2] if smoothing else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, index, elsewhere = ctx.saved_tensors
        found = probabilities - ctx.smoothing / ctx.classes
        if found.shape[-1]:
            target = (ctx.smoothing - 1) * (~elsewhere).to(found.dtype).unsqueeze(-1)
            found.scatter_add_(-1, index, target)
        return found.mul_(gradient.unsqueeze(-1)), None, None, None, None
