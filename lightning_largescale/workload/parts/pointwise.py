"""Rules of elementwise functions: each rank computes the elements of its shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.parts.engine import OnParts, Rule, called, is_in_place, names
from lightning_largescale.workload.parts.part import Part, as_part, part_of

_ARITHMETIC = names(
    """
    abs absolute add addcdiv addcmul bitwise_and bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max clamp_min clip
    copysign cos cosh deg2rad div divide eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin
    fmod frac ge gelu greater greater_equal gt hardshrink heaviside hypot isclose isfinite isinf isnan ldexp le lerp
    less less_equal lgamma log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor logit lt
    masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal pow positive reciprocal relu remainder
    rsqrt rsub round rad2deg sgn sigmoid sign sin sinc sinh sqrt square sub subtract tan tanh true_divide trunc where
    xlogy
    """
)
_OPERATORS = names(
    """
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __floordiv__
    __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __and__ __rand__ __or__ __ror__
    __xor__ __rxor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__
    __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    """
)
_ACTIVATIONS = names(
    """
    celu dropout elu gelu hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu
    softplus softshrink softsign tanh tanhshrink threshold
    """
)
# Functions whose result is sharded as the first argument; the other arguments do not matter for it.
_OF_THE_FIRST = names(
    """
    alias bfloat16 bool byte char clone contiguous cpu cuda detach detach_ double empty_like float half int long
    full_like ones_like rand_like randn_like requires_grad_ short to type_as zeros_like zero_ fill_
    """
)
_RANDOM = ("dropout", "dropout_", "rand_like", "randn_like")


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    methods = [*_ARITHMETIC, *_OPERATORS, *(f"{name}_" for name in _ARITHMETIC)]
    places: list[tuple[Any, Sequence[str]]] = [(torch.Tensor, methods), (torch, [*methods, "dropout", "dropout_"])]
    places += [(F, [*_ACTIVATIONS, *(f"{name}_" for name in _ACTIVATIONS)]), (torch.special, _ARITHMETIC)]
    found: dict[Callable[..., Any], Rule] = {}
    for place, listed in places:
        found |= {getattr(place, name): _pointwise for name in listed if hasattr(place, name)}
    for place in (torch.Tensor, torch):
        found |= {getattr(place, name): _of_the_first for name in _OF_THE_FIRST if hasattr(place, name)}
    found[torch.Tensor.data.__get__] = _data  # type: ignore[attr-defined]
    return found


def _data(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the values as `detach` does, so that writes into them increase the version counter."""
    return _of_the_first(engine, torch.Tensor.detach, args, kwargs)


def _pointwise(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if called(func) == "where" and len(args) + len(kwargs) < 3:
        return NotImplemented  # returns the indices where the condition is true
    tensors = tensors_in((tuple(args), kwargs))
    parts = [(part, tensor.dim()) for tensor in tensors if (part := part_of(tensor)) is not None]
    first, dims = parts[0]
    # Dimensions are counted from the last, since broadcasting aligns operands there.
    from_last = first.dim - dims
    if any(part.dim - dims != from_last or not part.alike(first) for part, dims in parts):
        return NotImplemented
    if is_in_place(func) and part_of(args[0]) is None:
        return NotImplemented
    for part, _ in parts[1:]:
        first = first.joined(part)
    args, kwargs = map_tensors((tuple(args), kwargs), lambda one: fitted(engine, one, first, from_last))
    with engine.ranks.own_random(tensors[0].device) if called(func) in _RANDOM else nullcontext():
        result = func(*args, **kwargs)
    return as_part(result, first.at(max(tensor.dim() for tensor in tensors) + from_last))


def fitted(engine: OnParts, tensor: Tensor, part: Part, from_last: int) -> Tensor:
    """Return a tensor, sharded to match another operand of the same function.

    Args:
        engine: The engine that runs the function.
        tensor: The tensor, which broadcasts with the other operand.
        part: The sharding of the other operand.
        from_last: The sharded dimension, counted from the last: -1 is the last one.

    Raises:
        TypeError: `tensor` is sharded otherwise.
    """
    own = part_of(tensor)
    if own is not None:
        if own.dim - tensor.dim() != from_last or not own.alike(part):
            raise TypeError("a tensor is divided otherwise than the one beside it")
        return tensor
    if -from_last > tensor.dim() or tensor.shape[from_last] == 1:
        return engine.entered(tensor)
    return engine.own(tensor, part.at(tensor.dim() + from_last))


def _of_the_first(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part = part_of(args[0]) if args else None
    with engine.ranks.own_random(args[0].device) if called(func) in _RANDOM and part else nullcontext():
        result = func(*args, **kwargs)
    return result if part is None else as_part(result, part)
