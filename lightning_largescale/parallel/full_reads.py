"""What user code reads of DTensors, in hooks and steps, as it would read it of the full tensors.

A DTensor's own answers are of three kinds there: right; of this rank's shard alone (`item` of a sum that is not reduced
yet), which nobody is told of; and refusals (`nonzero`, `numpy`, an operand that is a plain tensor). Here the second and
third are computed of the full tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.numbers import WholeNumbers
from lightning_largescale.parallel.order import as_ordered, divided, divided_dims, full, order_of
from lightning_largescale.parallel.parameter_access import name_of, writing
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.parts import share


class FullReads(WholeNumbers):
    """Within, functions of torch give of DTensors what they give of the full tensors; they are collectives where a
    DTensor's are, or where nothing else answers.

    Results of the shape of an argument stay sharded as it is; numbers, and what else is of another shape where a
    DTensor does not know it, are plain tensors, equal on all ranks.

    Args:
        in_step: what is computed may be differentiated: what needs a gradient is left to DTensor, which keeps it.
        losses: numbers that need a gradient are plain in a step too.
        note: is told of what is read by a collective.

    Attributes:
        suspended: functions are called as without, as while a step runs inside of a hook.
    """

    def __init__(
        self,
        *,
        in_step: bool = False,
        losses: bool = False,
        note: Callable[[str, Sequence[DTensor]], None] = lambda name, shards: None,
    ) -> None:
        super().__init__()
        self._note = note
        self._in_step, self._losses = in_step, losses
        self.suspended = False

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        shards = _shards_in(args, kwargs)
        if not shards:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        kind = compat.foreach_kind(func)
        if kind is not None or name == "__set__":
            with writing(args[0] if kind == "in place" else ()):
                return super().__torch_function__(func, types, args, kwargs)
        if name == "__get__":
            result = func(*args, **kwargs)
            return as_ordered(result, order_of(args[0])) if isinstance(result, DTensor) else result
        if func is torch.autograd.grad:
            # What it is given is told from what autograd computes with by `parallel.by_hand`.
            return func(*args, **kwargs)
        if _writes(name, kwargs):
            return _write(func, args, kwargs)
        differentiated = self._in_step and torch.is_grad_enabled() and any(shard.requires_grad for shard in shards)
        return self._read(func, shards, args, kwargs, differentiated=differentiated)

    def _read(
        self, func: Callable[..., Any], shards: list[DTensor], args: Any, kwargs: Any, *, differentiated: bool
    ) -> Any:
        if func in _VALUES:
            return self._of_full(func, args, kwargs)
        needs_full = any(map(_needs_full, shards)) and not _is_simple(func, args)
        if needs_full or _loses_nan(func, args):
            if not differentiated:
                return self._of_full(func, args, kwargs)
            if any(order_of(shard) is not None for shard in shards):
                raise PlanError(
                    f"{getattr(func, '__name__', func)} was given a sharded parameter of a block whose elements are in"
                    " another order under tp; compute that in `with self.trainer.strategy.full_parameters():`."
                )
            if _loses_nan(func, args) or any(map(_has_empty, shards)):
                self._note_read(func, shards)
                args, kwargs = map_tensors((args, kwargs), _gathered_differentiably)
                return func(*args, **kwargs)
        try:
            with warnings.catch_warnings():
                # That it takes a tensor of one element for equal on all ranks, as it is of user code.
                warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")
                result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            # Of shapes and placements, so raised on all ranks alike.
            if differentiated:
                raise
            return self._of_full(func, args, kwargs)
        if differentiated and not self._losses:
            return result
        result = _map_results(result, partial(self._reduced, func, shards))
        return as_ordered(result, order_of(shards[0])) if isinstance(result, DTensor) else result

    def _of_full(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`func` of the full tensors; what it gives of the shape of a shard is sharded as that is."""
        shards = _shards_in(args, kwargs)
        self._note_read(func, shards)
        # Those of parameters that are offloaded are in DRAM, and what the user computes with is on the device.
        plain = (one.device for one in tensors_in((args, kwargs)) if not isinstance(one, DTensor))
        device = next((one for one in plain if one.type != "cpu"), shards[0].device)

        def gathered(tensor: Tensor) -> Tensor:
            return full(tensor).to(device) if isinstance(tensor, DTensor) else tensor

        def like_shards(tensor: Tensor) -> Tensor:
            like = next((shard for shard in shards if shard.shape == tensor.shape and divided_dims(shard)), None)
            return tensor if like is None else as_ordered(divided(tensor, like, order_of(like)), order_of(like))

        with torch.no_grad():
            result = func(*map_tensors(args, gathered), **map_tensors(kwargs, gathered))
        if isinstance(result, np.ndarray) and shards[0].device_mesh.device_type == "cpu":
            # A copy, of what numpy shares elsewhere: what is written into it would be lost.
            result.flags.writeable = False
        return _map_results(result, like_shards)

    def _reduced(self, func: Callable[..., Any], shards: Sequence[DTensor], tensor: Tensor) -> Tensor:
        """A plain number; else without what ranks have yet to add up, which nothing could be written into."""
        if not isinstance(tensor, DTensor):
            return tensor
        if any(not placement.is_replicate() for placement in tensor.placements) and not divided_dims(tensor):
            self._note_read(func, shards)
        if not tensor.dim():
            return full(tensor)
        for axis, placement in enumerate(tensor.placements):
            if placement.is_partial():
                # By one axis after the other; all at once torch warns that it does so.
                tensor = tensor.redistribute(
                    placements=[Replicate() if at == axis else one for at, one in enumerate(tensor.placements)]
                )
        return tensor

    def _note_read(self, func: Callable[..., Any], shards: Sequence[DTensor]) -> None:
        if any(not placement.is_replicate() for shard in shards for placement in shard.placements):
            self._note(f"{getattr(func, '__name__', func)} of {', '.join(map(name_of, shards))}", shards)


# What is computed element by element, and of all elements, whatever their order and the mesh.
_ELEMENTWISE = """
    abs add clone detach div eq ge gt isfinite isinf isnan le logical_not lt mul nan_to_num ne neg pow sign square sub
    double float bool __and__ __eq__ __ge__ __gt__ __invert__ __le__ __lt__ __ne__ __or__ __pow__ __rmul__
"""
_SIMPLE = frozenset(_ELEMENTWISE.split())
_OF_ALL = frozenset({"all", "any", "linalg_vector_norm", "norm", "sum"})


_EXTREMES = frozenset({"amax", "amin", "aminmax", "argmax", "argmin", "max", "min"})


def _loses_nan(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether ranks find the greatest of theirs, which of NaN and a number may be the number."""
    name = getattr(func, "__name__", "")
    return name in _EXTREMES or ("norm" in name and _infinite(args[1:]))


def _infinite(orders: Sequence[Any]) -> bool:
    return any(isinstance(order, int | float) and abs(order) == torch.inf for order in orders)


def _is_simple(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a DTensor's rules hold of `func` for each order of elements, and without any on some ranks."""
    name = getattr(func, "__name__", "")
    first, others = args[0], args[1:]
    if name in _SIMPLE:
        return isinstance(first, DTensor) and all(
            isinstance(other, int | float)
            or (isinstance(other, Tensor) and not other.dim())
            or (isinstance(other, DTensor) and other.shape == first.shape and order_of(other) == order_of(first))
            for other in others
        )
    return name in _OF_ALL and len(args) <= (2 if "norm" in name else 1)


# What gives values to Python; of a DTensor they are this rank's.
_VALUES = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.is_nonzero,
        torch.is_nonzero,
        *(
            getattr(Tensor, name)
            for name in (
                "__array__",
                "__bool__",
                "__complex__",
                "__contains__",
                "__float__",
                "__format__",
                "__index__",
                "__int__",
            )
        ),
    }
)


def _shards_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[DTensor]:
    """The DTensors among arguments and in their lists."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, DTensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, DTensor)]
    return found


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of that name changes an argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE_OPERATORS or kwargs.get("out") is not None


# As Python calls `a += b` and the like.
_IN_PLACE_OPERATORS = frozenset(
    {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
    | {"__setitem__"}
)


def _needs_full(shard: DTensor) -> bool:
    """Whether DTensor's rules may not hold of it: its elements stand in another order than the user's, a rank has none,
    of which there is no largest, or it is sharded over a mesh of several dimensions, of which torch warns.
    """
    return order_of(shard) is not None or shard.device_mesh.ndim > 1 or _has_empty(shard)


def _has_empty(shard: DTensor) -> bool:
    sizes = [*shard.shape]
    for axis, placement in enumerate(shard.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            ranks = shard.device_mesh.size(axis)
            sizes[dim] = share(sizes[dim], ranks - 1, ranks)[1]
    return 0 in sizes and 0 not in shard.shape


def _gathered_differentiably(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, with the graph; its gradient is to be equal on all ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()


def _write(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A function that changes its first argument, or `out`: of plain operands of the same shape each rank takes its
    shard.
    """
    target = kwargs.get("out", args[0] if args else None)
    if not isinstance(target, DTensor):
        return func(*args, **kwargs)
    order = order_of(target)

    def like_target(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            return tensor
        if not tensor.dim():
            return tensor.to(target.device)
        whole = tensor.expand(target.shape) if tensor.dim() <= target.dim() else tensor
        return divided(whole.contiguous(), target, order)

    if _plain_in(args, kwargs) and func is not Tensor.__setitem__:
        args, kwargs = map_tensors((args, kwargs), like_target)
    return func(*args, **kwargs)


def _plain_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [
        value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and not isinstance(value, DTensor)
    ]


def _map_results(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`result` of a function of torch, `change` made of each tensor in it."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, tuple | list):
        # Those that torch names fields of are made of an iterable too.
        return type(result)(_map_results(one, change) for one in result)
    return result
