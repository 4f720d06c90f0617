"""Rules of functions that view, slice, index, repeat or concatenate tensors, or read their shape and attributes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.workload.parts.engine import OnParts, Rule, names
from lightning_largescale.workload.parts.part import Part, as_part, global_shape, part_of, share
from lightning_largescale.workload.parts.reshape import reshaped


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    by_name: dict[str, Rule] = {
        "cat": _cat,
        "chunk": _chunk,
        "concat": _cat,
        "expand": _expand,
        "expand_as": _expand_as,
        "flatten": _flatten,
        "narrow": _narrow,
        "numel": _numel,
        "permute": _permute,
        "ravel": _flatten,
        "repeat": _repeat,
        "repeat_interleave": _repeat_interleave,
        "reshape": _view,
        "reshape_as": _view_as,
        "select": _select,
        "size": _size,
        "split": _split,
        "split_with_sizes": _split,
        "squeeze": _squeeze,
        "stack": _stack,
        "swapaxes": _transpose,
        "swapdims": _transpose,
        "t": _last_two,
        "transpose": _transpose,
        "unbind": _unbind,
        "unflatten": _unflatten,
        "unsqueeze": _unsqueeze,
        "view": _view,
        "view_as": _view_as,
        "__getitem__": _getitem,
        "__len__": _len,
    }
    by_name |= dict.fromkeys(
        names(
            "dim ndimension element_size is_contiguous is_floating_point is_complex get_device"
            " new_empty new_full new_ones new_tensor new_zeros"
        ),
        _about_local,
    )
    found = {
        getattr(place, name): rule
        for name, rule in by_name.items()
        for place in (torch, torch.Tensor)
        if hasattr(place, name)
    }
    attributes: dict[str, Rule] = {"shape": _size, "T": _last_two, "mT": _last_two}
    attributes |= dict.fromkeys(
        names(
            "device dtype ndim layout requires_grad is_leaf grad_fn is_cuda is_sparse is_quantized is_meta is_nested"
            " is_mkldnn is_mps is_xpu is_cpu"
        ),
        _about_local,
    )
    return found | {getattr(torch.Tensor, name).__get__: rule for name, rule in attributes.items()}


_ALL_TURNED = torch.Tensor.T.__get__  # type: ignore[attr-defined]


def _about_local(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _size(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    shape = global_shape(args[0])
    dim = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim")
    return shape if dim is None else shape[dim]


def _len(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return global_shape(args[0])[0]


def _numel(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return math.prod(global_shape(args[0]))


def _found(tensor: Any) -> tuple[Part, int]:
    """Return the sharding of `tensor` and its number of dimensions."""
    part = part_of(tensor)
    assert part is not None
    return part, tensor.dim()


def _numbers(values: Sequence[Any]) -> list[Any]:
    """Return sizes or dimensions that are given one by one or as one sequence."""
    return list(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else list(values)


def _view(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    given = _numbers(args[1:]) or list(kwargs.get("shape", kwargs.get("size", ())))
    if not all(isinstance(size, int) for size in given):
        return NotImplemented  # a view as another dtype
    return _viewed(engine, func, args[0], given)


def _view_as(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if part_of(args[0]) is None:
        return args[0].view(global_shape(args[1]))
    return _viewed(engine, torch.Tensor.reshape, args[0], list(global_shape(args[1])))


def _viewed(engine: OnParts, func: Callable[..., Any], tensor: Tensor, given: list[int]) -> Any:
    part, _ = _found(tensor)
    shape = global_shape(tensor)
    known = math.prod(size for size in given if size != -1)
    if known == 0:
        return NotImplemented
    target = [math.prod(shape) // known if size == -1 else size for size in given]
    viewed = reshaped(part, shape, target, engine.ranks.size)
    if viewed is None:
        first = next((size for size in target[part.dim :] if size > 1), 1)
        if part.dim == len(shape) - 1 and part.size % first == 0:
            engine.separates(part, [part.size // first] * first)
        return NotImplemented
    others = math.prod(size for dim, size in enumerate(target) if dim != viewed.dim)
    local = [tensor.numel() // others if dim == viewed.dim else size for dim, size in enumerate(target)]
    return as_part(func(tensor, local), viewed)


def _flatten(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensor, shape = args[0], global_shape(args[0])
    start = kwargs.get("start_dim", args[1] if len(args) > 1 else 0) % len(shape)
    end = kwargs.get("end_dim", args[2] if len(args) > 2 else -1) % len(shape)
    target = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
    return _viewed(engine, torch.Tensor.reshape, tensor, target)


def _unflatten(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensor, shape = args[0], global_shape(args[0])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(shape)
    sizes = list(kwargs.get("sizes", args[2] if len(args) > 2 else ()))
    known = -math.prod(sizes) if -1 in sizes else 1
    sizes = [shape[dim] // known if size == -1 else size for size in sizes]
    return _viewed(engine, torch.Tensor.reshape, tensor, [*shape[:dim], *sizes, *shape[dim + 1 :]])


def _transpose(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    if len(args) != 3:
        return NotImplemented
    one, other = args[1] % dims, args[2] % dims
    return as_part(func(*args), part.at({one: other, other: one}.get(part.dim, part.dim)))


def _last_two(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    if dims < 2:
        return NotImplemented
    if func == _ALL_TURNED and dims > 2:
        return as_part(func(args[0]), part.at(dims - 1 - part.dim))
    return as_part(func(args[0]), part.at({dims - 1: dims - 2, dims - 2: dims - 1}.get(part.dim, part.dim)))


def _permute(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    order = [dim % dims for dim in _numbers(args[1:]) or list(kwargs["dims"])]
    return as_part(args[0].permute(order), part.at(order.index(part.dim)))


def _squeeze(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    shape = global_shape(args[0])
    given = kwargs.get("dim", args[1] if len(args) > 1 else range(dims))
    asked = {dim % dims for dim in ([given] if isinstance(given, int) else given)}
    gone = [dim for dim in asked if shape[dim] == 1]
    return as_part(args[0].squeeze(tuple(gone)), part.at(part.dim - sum(dim < part.dim for dim in gone)))


def _unsqueeze(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (dims + 1)
    return as_part(args[0].unsqueeze(dim), part.at(part.dim + (dim <= part.dim)))


def _expand(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _expanded(args[0], _numbers(args[1:]) or list(kwargs.get("size", ())))


def _expand_as(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    sizes = list(global_shape(args[1]))
    return args[0].expand(sizes) if part_of(args[0]) is None else _expanded(args[0], sizes)


def _expanded(tensor: Tensor, sizes: list[int]) -> Tensor:
    part, dims = _found(tensor)
    dim = part.dim + len(sizes) - dims
    sizes[dim] = -1
    return as_part(tensor.expand(sizes), part.at(dim))


def _repeat(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    times = _numbers(args[1:]) or list(kwargs.get("repeats", ()))
    dim = part.dim + len(times) - dims
    return as_part(args[0].repeat(times), Part(dim, part.pieces * times[dim], part.origins))


def _repeat_interleave(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    times = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(times, int) or dim is None or "output_size" in kwargs:
        return NotImplemented
    if any(piece % engine.ranks.size for piece in part.pieces):
        return NotImplemented
    by = times if dim % dims == part.dim else 1
    pieces = tuple(piece * by for piece in part.pieces)
    return as_part(func(*args, **kwargs), Part(part.dim, pieces, part.origins))


def _taken(engine: OnParts, tensor: Tensor, start: int, length: int) -> Any:
    """Slice the sharded dimension, if the slice consists of full sections."""
    part, _ = _found(tensor)
    edges = [*itertools.accumulate(part.pieces, initial=0)]
    if start not in edges or start + length not in edges:
        engine.separates(part, [size for size in (start, length, part.size - start - length) if size])
        return NotImplemented
    first, last = edges.index(start), edges.index(start + length)
    local = [share(piece, engine.ranks.rank, engine.ranks.size)[1] for piece in part.pieces]
    taken = tensor.narrow(part.dim, sum(local[:first]), sum(local[first:last]))
    return as_part(taken, Part(part.dim, part.pieces[first:last], part.origins))


def _narrow(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) != 4 or not isinstance(args[2], int):
        return NotImplemented
    part, dims = _found(args[0])
    if args[1] % dims == part.dim:
        return _taken(engine, args[0], args[2] % max(1, part.size), args[3])
    return as_part(func(*args), part)


def _select(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3:
        return NotImplemented
    part, dims = _found(args[0])
    if args[1] % dims == part.dim:
        engine.separates(part, [1] * part.size)
        return NotImplemented
    return as_part(func(*args), part.at(part.dim - (args[1] % dims < part.dim)))


def _unbind(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part, dims = _found(args[0])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % dims
    if dim == part.dim:
        engine.separates(part, [1] * part.size)
        return NotImplemented
    return tuple(as_part(one, part.at(part.dim - (dim < part.dim))) for one in args[0].unbind(dim))


def _split(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    dims = args[0].dim()
    given = next(
        (kwargs[key] for key in ("split_size", "split_size_or_sections", "split_sizes") if key in kwargs), None
    )
    given = args[1] if given is None else given
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % dims
    size = global_shape(args[0])[dim]
    sizes = [min(given, size - at) for at in range(0, size, given)] if isinstance(given, int) else list(given)
    return _stretches(engine, args[0], dim, sizes)


def _chunk(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    dims = args[0].dim()
    count = kwargs.get("chunks", args[1] if len(args) > 1 else 1)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % dims
    size = global_shape(args[0])[dim]
    each = -(-size // count)
    return _stretches(engine, args[0], dim, [min(each, size - at) for at in range(0, size, each)])


def _stretches(engine: OnParts, tensor: Tensor, dim: int, sizes: list[int]) -> Any:
    part, _ = _found(tensor)
    if dim != part.dim:
        return tuple(as_part(one, part) for one in torch.split(tensor, sizes, dim))
    edges = {*itertools.accumulate(part.pieces)}
    if any(edge not in edges for edge in itertools.accumulate(sizes)):
        engine.separates(part, sizes)
        return NotImplemented
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return tuple(_taken(engine, tensor, start, size) for start, size in zip(starts, sizes, strict=True))


def _cat(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    # Torch also leaves out empty tensors of one dimension.
    tensors = [one for one in args[0] if one.shape != (0,)]
    first, dims = _found(next(one for one in tensors if part_of(one) is not None))
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % dims
    if dim != first.dim:
        fitted = _beside(engine, tensors, first)
        return NotImplemented if fitted is None else as_part(torch.cat(fitted, dim), first)
    parts = [part_of(one) for one in tensors]
    if any(part is None or part.dim != dim for part in parts):
        return NotImplemented
    pieces = tuple(piece for part in parts if part is not None for piece in part.pieces)
    return as_part(torch.cat(list(tensors), dim), Part(dim, pieces, first.origins))


def _stack(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    first, dims = _found(next(one for one in tensors if part_of(one) is not None))
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (dims + 1)
    fitted = _beside(engine, tensors, first)
    if fitted is None:
        return NotImplemented
    return as_part(torch.stack(fitted, dim), first.at(first.dim + (dim <= first.dim)))


def _beside(engine: OnParts, tensors: Sequence[Tensor], first: Part) -> list[Tensor] | None:
    """Return `tensors`, each sharded as `first`; None if one is sharded otherwise."""
    parts = [part_of(one) for one in tensors]
    if any(part is not None and (part.dim != first.dim or not part.alike(first)) for part in parts):
        return None
    return [engine.own(one, first) if part is None else one for one, part in zip(tensors, parts, strict=True)]


def _getitem(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if part_of(tensor) is None or any(isinstance(one, Tensor | list | bool) for one in index):
        return _by_tensor(tensor, index)
    if any(not (one is None or one is Ellipsis or type(one) is int or isinstance(one, slice)) for one in index):
        return NotImplemented
    part, dims = _found(tensor)
    taking = sum(one is not None and one is not Ellipsis for one in index)
    filled = dims - taking
    index = tuple(
        entry
        for one in (index if Ellipsis in index else (*index, Ellipsis))
        for entry in ([slice(None)] * filled if one is Ellipsis else [one])
    )
    # The position of the sharded dimension among the indices, and its dimension in the result.
    at = next(place for place, _ in enumerate(index) if sum(one is not None for one in index[: place + 1]) > part.dim)
    dim = sum(not isinstance(one, int) for one in index[:at])
    taken = index[at]
    if not isinstance(taken, slice):
        engine.separates(part, [1] * part.size)
        return NotImplemented
    start, stop, step = taken.indices(part.size)
    if (start, stop, step) != (0, part.size, 1):
        if step != 1:
            return NotImplemented
        tensor = _taken(engine, tensor, start, max(0, stop - start))
        if tensor is NotImplemented:
            return NotImplemented
        part, _ = _found(tensor)
    kept = (*index[:at], slice(None), *index[at + 1 :])
    return as_part(tensor[kept], part.at(dim))


def _by_tensor(tensor: Tensor, index: tuple[Any, ...]) -> Any:
    """Index dimensions that are not sharded by one tensor of indices or one mask."""
    part = part_of(tensor)
    at = next((place for place, one in enumerate(index) if isinstance(one, Tensor)), None)
    if part is None or at is None or part_of(index[at]) is not None:
        return NotImplemented
    if index[at].dtype not in (torch.bool, torch.int64, torch.int32):
        return NotImplemented
    rest = [one for place, one in enumerate(index) if place != at]
    taken = index[at].dim() if index[at].dtype == torch.bool else 1
    if any(not isinstance(one, slice) or one != slice(None) for one in rest) or at <= part.dim < at + taken:
        return NotImplemented
    made = 1 if index[at].dtype == torch.bool else index[at].dim()
    return as_part(tensor[index], part.at(part.dim + (made - taken if at < part.dim else 0)))
