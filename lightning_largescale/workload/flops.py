"""Floating-point operations of operators: those of torch's registry, and of operators that it lacks.

Source: torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_largescale import compat

_aten = torch.ops.aten


class FlopsOf(compat.DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of whatever runs under it, and nothing else.

    Attributes:
        flops: the count so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += count_flops(func, args, kwargs or {}, out)
        return out


def is_product(func: Any) -> bool:
    """Return whether `func` is a matrix product, a convolution, attention, or another operator with counted FLOPs."""
    packet = getattr(func, "overloadpacket", None)
    return packet in _OUR_FLOPS or packet in flop_registry


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the floating-point operations of one call of the operator `func`, 0 for operators without a count."""
    packet = func.overloadpacket
    if (count := _OUR_FLOPS.get(packet)) is not None:
        return count(args)
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _attention_flops(args: Any) -> int:
    return int(sdpa_flop_count(*_attention_shapes(*args[:3])))  # type: ignore[no-untyped-call]


def _attention_backward_flops(args: Any) -> int:
    gradient, *operands = args[:4]
    return int(sdpa_backward_flop_count(gradient.shape, *_attention_shapes(*operands)))  # type: ignore[no-untyped-call]


def _attention_shapes(query: torch.Tensor, *keys_and_values: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Yield the shapes with as many heads of keys and values as of queries.

    Several query heads may share a head of keys and values, which torch 2.11 refuses to count.
    """
    yield tuple(query.shape)
    for shared in keys_and_values:
        yield (*query.shape[:2], *shared.shape[2:])


def _recurrent_flops(args: Any) -> int:
    """Count one layer in one direction: at each time step, input and state are each multiplied by a matrix."""
    places = args[0].numel() // args[0].shape[-1]
    return int(2 * places * (args[1].numel() + args[2].numel()))


def _recurrent_backward_flops(args: Any) -> int:
    return 2 * _recurrent_flops(args)


_ATTENTION = ("efficient_attention", "flash_attention", "cudnn_attention", "flash_attention_for_cpu")
# Attention with shared heads, and what torch's registry lacks: the CPU's attention, recurrent kernels.
_OUR_FLOPS: dict[Any, Callable[[Any], int]] = {
    **{getattr(_aten, f"_scaled_dot_product_{name}"): _attention_flops for name in _ATTENTION},
    **{getattr(_aten, f"_scaled_dot_product_{name}_backward"): _attention_backward_flops for name in _ATTENTION},
    _aten.mkldnn_rnn_layer: _recurrent_flops,
    _aten.mkldnn_rnn_layer_backward: _recurrent_backward_flops,
}
