"""Reads of DTensors by user code, in hooks and steps, with the results of the full tensors.

A DTensor's own result is one of three: correct; silently that of this rank's shard alone (`item` of a sum that is not
reduced yet); or an error (`nonzero`, `numpy`, an operand that is a plain tensor). In the second and third case this
module computes with the full tensors.
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
    """Context in which torch functions return for DTensors what they return for the full tensors.

    They are collectives where the DTensor's function is one, or where only the full tensors give the result.

    Results of the shape of an argument stay sharded like it. Numbers, and results of another shape that DTensor
    cannot compute, are plain tensors, equal on all ranks.

    Args:
        in_step: Whether results may be differentiated; then DTensor computes those that need a gradient.
        losses: Whether numbers that need a gradient are plain tensors in a step too.
        note: Callback that receives the description and the DTensors of each read that takes a collective.

    Attributes:
        suspended: whether functions are called unchanged, as while a step runs inside a hook.
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
            # `parallel.by_hand` maps its arguments to the tensors that autograd computes with.
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
                # DTensor warns that it takes a tensor of one element as equal on all ranks; in user code it is.
                warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")
                result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            # It depends on shapes and placements only, so all ranks raise it.
            if differentiated:
                raise
            return self._of_full(func, args, kwargs)
        if differentiated and not self._losses:
            return result
        result = _map_results(result, partial(self._reduced, func, shards))
        return as_ordered(result, order_of(shards[0])) if isinstance(result, DTensor) else result

    def _of_full(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call `func` with the full tensors; shard results that have the shape of a sharded argument like it."""
        shards = _shards_in(args, kwargs)
        self._note_read(func, shards)
        # Shards of offloaded parameters are in DRAM; the user's other tensors are on the device.
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
            # It is a copy, unlike numpy's usual shared memory, so writes into it would be lost.
            result.flags.writeable = False
        return _map_results(result, like_shards)

    def _reduced(self, func: Callable[..., Any], shards: Sequence[DTensor], tensor: Tensor) -> Tensor:
        """Return a number as a plain tensor, else reduce partial placements, which do not allow writes."""
        if not isinstance(tensor, DTensor):
            return tensor
        if any(not placement.is_replicate() for placement in tensor.placements) and not divided_dims(tensor):
            self._note_read(func, shards)
        if not tensor.dim():
            return full(tensor)
        for axis, placement in enumerate(tensor.placements):
            if placement.is_partial():
                # One mesh axis after the other: torch warns when it reduces several at once.
                tensor = tensor.redistribute(
                    placements=[Replicate() if at == axis else one for at, one in enumerate(tensor.placements)]
                )
        return tensor

    def _note_read(self, func: Callable[..., Any], shards: Sequence[DTensor]) -> None:
        if any(not placement.is_replicate() for shard in shards for placement in shard.placements):
            self._note(f"{getattr(func, '__name__', func)} of {', '.join(map(name_of, shards))}", shards)


# Elementwise functions, and below reductions of all elements, that are correct for any element order and mesh.
_ELEMENTWISE = """
    abs add clone detach div eq ge gt isfinite isinf isnan le logical_not lt mul nan_to_num ne neg pow sign square sub
    double float bool __and__ __eq__ __ge__ __gt__ __invert__ __le__ __lt__ __ne__ __or__ __pow__ __rmul__
"""
_SIMPLE = frozenset(_ELEMENTWISE.split())
_OF_ALL = frozenset({"all", "any", "linalg_vector_norm", "norm", "sum"})


_EXTREMES = frozenset({"amax", "amin", "aminmax", "argmax", "argmin", "max", "min"})


def _loses_nan(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Return whether `func` reduces extremes of shards across ranks, which may drop a NaN in favor of a number."""
    name = getattr(func, "__name__", "")
    return name in _EXTREMES or ("norm" in name and _infinite(args[1:]))


def _infinite(orders: Sequence[Any]) -> bool:
    return any(isinstance(order, int | float) and abs(order) == torch.inf for order in orders)


def _is_simple(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Return whether DTensor computes `func` correctly for any element order, and with empty shards on some ranks."""
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


# Functions that return Python values; a DTensor returns those of this rank's shard.
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
    """Return the DTensors among the arguments, and in lists and tuples among them."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, DTensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [one for one in value if isinstance(one, DTensor)]
    return found


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function of that name writes into an argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE_OPERATORS or kwargs.get("out") is not None


# Python's methods for `a += b` and the like.
_IN_PLACE_OPERATORS = frozenset(
    {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
    | {"__setitem__"}
)


def _needs_full(shard: DTensor) -> bool:
    """Return whether DTensor's own results may be wrong for `shard`.

    They may be if its elements are in another order than the user's, if a rank's shard is empty, which has no maximum,
    or if its mesh has several dimensions, about which torch warns.
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
    """Return the full tensor of a shard, differentiably; its gradient must be equal on all ranks."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()


def _write(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function that writes into its first argument, or `out`, with plain operands sharded like that target."""
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
    """Return the `result` of a torch function with `change` applied to each tensor in it."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, tuple | list):
        # torch's named result types are constructed from an iterable too.
        return type(result)(_map_results(one, change) for one in result)
    return result
