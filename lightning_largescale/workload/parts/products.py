"""Rules of products of matrices and of batches of them.

A column-wise sharded matrix takes unsharded inputs and gives shards. A row-wise sharded matrix takes these shards, and
its results are all-reduced.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3; Korthikanti et al. 2022, "Reducing Activation Recomputation in
    Large Transformer Models", section 4.2.2, where inputs are sharded along the sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_largescale.workload.parts.engine import OnParts, Rule
from lightning_largescale.workload.parts.part import Part, as_part, part_of
from lightning_largescale.workload.parts.pointwise import fitted


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    places = (torch, torch.Tensor)
    found: dict[Callable[..., Any], Rule] = {
        getattr(place, name): _product for name in ("matmul", "mm", "bmm") for place in places
    }
    found |= {torch.Tensor.__matmul__: _product, torch.Tensor.__rmatmul__: _swapped}
    found |= {F.linear: _linear, torch.einsum: _einsum}
    return found | {getattr(place, name): _added for name in ("addmm", "baddbmm") for place in places}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Signature of `torch.nn.functional.linear`, which has none that `inspect` can read.

    Args:
        input: The input.
        weight: The matrix.
        bias: The bias; None if there is none.
    """


LINEAR = inspect.signature(linear)


def _linear(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = LINEAR.bind(*args, **kwargs).arguments
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    if weight.dim() != 2 or input.dim() < 2:
        return NotImplemented
    part = part_of(weight)
    turned = None if part is None else part.at(1 - part.dim)
    operands = _operands(engine, input, weight, part_of(input), turned)
    if operands is None:
        return NotImplemented
    input, weight, result = operands
    with engine.saving_gathered(input):
        if isinstance(result, list) or bias is None:
            return _added_up(engine, func(input, weight), result, bias)
        return as_part(func(input, weight, fitted(engine, bias, result, result.dim - input.dim())), result)


def _product(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    return _multiplied(engine, func, args[0], args[1])


def _swapped(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _multiplied(engine, torch.matmul, args[1], args[0])


def _added(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    scales = {key: kwargs[key] for key in ("alpha", "beta") if key in kwargs}
    named = [kwargs[key] for key in ("input", "mat1", "batch1", "mat2", "batch2") if key in kwargs]
    if len(args) + len(named) != 3 or len(scales) + len(named) != len(kwargs):
        return NotImplemented
    added, left, right = *args, *named
    operands = _operands(engine, left, right, part_of(left), part_of(right))
    if operands is None:
        return NotImplemented
    left, right, result = operands
    if isinstance(result, list):
        product = torch.matmul(left, right) * scales.get("alpha", 1)
        return _added_up(engine, product, result, _scaled(added, scales.get("beta", 1)))
    added = fitted(engine, added, result, result.dim - left.dim())
    with engine.saving_gathered(left):
        return as_part(func(added, left, right, **scales), result)


def _scaled(added: Tensor, beta: Any) -> Tensor | None:
    """Return `added * beta`; None for a beta of 0, since torch then ignores `added`, whatever its values."""
    return added * beta if beta else None


def _multiplied(engine: OnParts, func: Callable[..., Any], left: Tensor, right: Tensor) -> Any:
    if left.dim() < 2 or right.dim() < 2:
        return NotImplemented
    operands = _operands(engine, left, right, part_of(left), part_of(right))
    if operands is None:
        return NotImplemented
    left, right, result = operands
    with engine.saving_gathered(left):
        return _added_up(engine, func(left, right), result, None)


def _added_up(engine: OnParts, result: Tensor, division: Part | list[Part], added: Tensor | None) -> Tensor:
    """Mark a product as a shard, or sum it over the ranks, and add `added`."""
    result = engine.reduced(result, division) if isinstance(division, list) else as_part(result, division)
    if added is None:
        return result
    part = part_of(result)
    if torch.is_autocast_enabled(result.device.type):
        # Autocast casts the added tensor as it casts the product.
        added = added.to(result.dtype)
    if part is None:
        return result + added
    return as_part(result + fitted(engine, added, part, part.dim - result.dim()), part)


def _operands(
    engine: OnParts, left: Tensor, right: Tensor, left_part: Part | None, right_part: Part | None
) -> tuple[Tensor, Tensor, Part | list[Part]] | None:
    """Return the local operands and the sharding of their product, or both shardings if it has to be summed.

    None if the product has to be computed unsharded. Dimensions of the right operand are given as those of a matrix
    whose rows are contracted.
    """
    dims = max(left.dim(), right.dim())
    one = None if left_part is None else left_part.dim - left.dim()
    other = None if right_part is None else right_part.dim - right.dim()
    if left_part is not None and right_part is not None:
        if one == -1 and other == -2:
            return (left, right, [left_part, right_part]) if left_part.alike(right_part) else None
        if one == other and one is not None and one < -2 and left_part.alike(right_part):
            return left, right, left_part.joined(right_part).at(dims + one)
        if other == -1 and one != -1 and right.dim() == 2:
            # The input is sharded along the sequence: every rank needs all of it for its columns.
            return engine.gathered(left, left_part), right, right_part.at(dims - 1)
        return None
    if right_part is None:
        assert one is not None
        assert left_part is not None
        if one == -1:
            return None
        right = engine.entered(right) if one == -2 else fitted(engine, right, left_part, one)
        return left, right, left_part.at(dims + one)
    assert other is not None
    if other == -2:
        return None
    left = engine.entered(left) if other == -1 else fitted(engine, left, right_part, other)
    return left, right, right_part.at(dims + other)


def _einsum(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    equation, operands = args[0], args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return NotImplemented
    inputs, output = equation.replace(" ", "").split("->")
    letters = inputs.split(",")
    if any(len(set(one)) < len(one) for one in letters):
        return NotImplemented
    parts = [(part, names[part.dim]) for one, names in zip(operands, letters, strict=True) if (part := part_of(one))]
    first, letter = parts[0]
    if letter not in output or any(name != letter or not part.alike(first) for part, name in parts):
        return NotImplemented
    local = []
    for one, names in zip(operands, letters, strict=True):
        if part_of(one) is None:
            own = letter in names and one.shape[names.index(letter)] > 1
            one = engine.own(one, first.at(names.index(letter))) if own else engine.entered(one)
        elif part_of(one).dim != names.index(letter):  # type: ignore[union-attr]
            return NotImplemented
        local.append(one)
    return as_part(func(equation, *local), first.at(output.index(letter)))
