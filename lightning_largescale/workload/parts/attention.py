"""Rules of attention: heads and samples are computed independently, so either can be sharded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_largescale.workload.parts.engine import OnParts, Rule, any_part
from lightning_largescale.workload.parts.part import Part, as_part, part_of, share
from lightning_largescale.workload.parts.pointwise import fitted

_HEADS = -3  # of queries, keys and values, counted from the last dimension


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    return {F.scaled_dot_product_attention: _attention, F.multi_head_attention_forward: _multi_head}


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The arguments of `torch.nn.functional.scaled_dot_product_attention`, which has no signature."""


_SIGNATURE = inspect.signature(_arguments)


def _attention(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    operands = [given.pop(name) for name in ("query", "key", "value")]
    mask = given.pop("attn_mask", None)
    parts = [part for one in operands if (part := part_of(one)) is not None]
    if not parts:
        return NotImplemented
    first, dims = parts[0], operands[0].dim()
    from_last = first.dim - dims
    if from_last > _HEADS or any(one.dim() != dims for one in operands):
        return NotImplemented
    if any(part.dim != first.dim for part in parts) or part_of(mask) is not None:
        return NotImplemented
    query, key, value = operands
    heads = part_of(query)
    if heads is None:
        if query.shape[from_last] != first.size:
            return NotImplemented
        query, heads = fitted(engine, query, first, from_last), first
    of_key, of_value = part_of(key), part_of(value)
    if of_key is not None and of_value is not None:
        grouped = len(heads.pieces) == 1 and heads.size % of_key.size == 0
        if not of_key.alike(of_value) or not (of_key.alike(heads) or grouped):
            return NotImplemented
    elif key.shape[from_last] == value.shape[from_last] == heads.size:
        key, value = (fitted(engine, one, heads, from_last) for one in (key, value))
    elif from_last == _HEADS and given.get("enable_gqa") and of_key is of_value is None:
        # Too few heads to shard: each rank takes those that its queries attend to.
        key, value = (_looked_at(engine, one, heads) for one in (key, value))
        given["enable_gqa"] = False
    else:
        return NotImplemented
    if mask is not None:
        mask = fitted(engine, mask, heads, from_last)
    with engine.ranks.own_random(query.device) if given.get("dropout_p") else nullcontext():
        return as_part(func(query, key, value, mask, **given), heads)


def _looked_at(engine: OnParts, whole: Tensor, heads: Part) -> Tensor:
    """Select from all heads of keys or values the one that each of this rank's query heads attends to."""
    start, length = share(heads.size, engine.ranks.rank, engine.ranks.size)
    each = heads.size // whole.shape[_HEADS]
    index = torch.arange(start, start + length, device=whole.device) // each
    return engine.entered(whole).index_select(whole.dim() + _HEADS, index)


def _multi_head(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Compute the attention of `nn.MultiheadAttention` by functions that have rules."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    extra = (given.bias_k, given.bias_v, given.static_k, given.static_v)
    if given.add_zero_attn or any(one is not None for one in extra) or any_part((given.query, given.key, given.value)):
        return NotImplemented
    width = given.embed_dim_to_check
    if not given.use_separate_proj_weight:
        # One matrix holds q, k and v side by side.
        given.in_proj_weight, given.in_proj_bias = engine.offered(
            given.in_proj_weight, given.in_proj_bias, Part(0, (width,) * 3)
        )
    with engine:
        output, weights = _attended(given)
    if weights is None:
        return output, None
    # Without this, the mean over heads would all-gather the weights first.
    if given.average_attn_weights:
        weights = _averaged(engine, weights)
    batched = given.query.dim() == 3
    return output, weights if batched else weights.squeeze(0)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _attended(given: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    batched = given.query.dim() == 3
    query, key, value = (one if batched else one.unsqueeze(1) for one in (given.query, given.key, given.value))
    projected = _projected(given, query, key, value)
    # (positions, samples, heads, head width) -> (samples, heads, positions, head width).
    q, k, v = (one.view(*one.shape[:2], given.num_heads, -1).permute(1, 2, 0, 3) for one in projected)
    mask = _mask(given, q, k.shape[-2])
    dropout = given.dropout_p if given.training else 0.0
    weights = None
    if given.need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        attended = weights @ v
    else:
        causal = given.is_causal and given.key_padding_mask is None
        attended = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
    output = F.linear(attended.permute(2, 0, 1, 3).flatten(-2), given.out_proj_weight, given.out_proj_bias)
    return output if batched else output.squeeze(1), weights


def _projected(given: SimpleNamespace, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    if given.use_separate_proj_weight:
        biases = [None] * 3 if given.in_proj_bias is None else given.in_proj_bias.chunk(3)
        separate = (given.q_proj_weight, given.k_proj_weight, given.v_proj_weight)
        return [F.linear(*of) for of in zip((query, key, value), separate, biases, strict=True)]
    if given.query is given.key is given.value:
        return F.linear(query, given.in_proj_weight, given.in_proj_bias).chunk(3, -1)
    biases = [None] * 3 if given.in_proj_bias is None else given.in_proj_bias.chunk(3)
    return [F.linear(*of) for of in zip((query, key, value), given.in_proj_weight.chunk(3), biases, strict=True)]


def _mask(given: SimpleNamespace, query: Tensor, places: int) -> Tensor | None:
    """Return the mask to add to the scores: minus infinity at masked positions; None without masks."""
    samples, heads, length, _ = query.shape
    masks = []
    if given.attn_mask is not None:
        by_head = given.attn_mask.dim() == 3
        masks.append(given.attn_mask.view(samples, heads, length, places) if by_head else given.attn_mask)
    if given.key_padding_mask is not None:
        masks.append(given.key_padding_mask.view(samples, 1, 1, places))
    added = [
        torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0]) if added else None


def _averaged(engine: OnParts, weights: Tensor) -> Tensor:
    part = part_of(weights)
    if part is None or part.dim != 1:
        return weights.mean(1)
    return engine.ranks.reduce(weights.sum(1)) / part.size
