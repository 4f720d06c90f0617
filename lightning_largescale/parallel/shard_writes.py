"""In-place operations on the shard of a parameter, with the operands of the full parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.order import divided, full, order_of

if TYPE_CHECKING:
    from lightning_largescale.parallel.watched import Watched

# Part of torch's error for operations that mix shards and plain tensors.
MIXED = "torch.Tensor and DTensor"


def write_in_place(watched: Watched, function: Callable[..., Any], values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call `function`, which writes into a shard, with this rank's slices of full arguments.

    Args:
        watched: the parameter.
        function: the operation.
        values: the shard's values.
        *args: further arguments of `function`.
        **kwargs: keyword arguments of `function`.

    Raises:
        PlanError: an argument is a plain tensor of another shape.
    """
    shard = watched.one.shard

    def slice_of(one: Any) -> Any:
        if not isinstance(one, Tensor) or isinstance(one, DTensor) or one.shape != values.shape or not one.dim():
            return one
        return divided(one.detach().to(values.device), shard, order_of(shard))

    try:
        with watched.writing_shard():
            return function(values, *map(slice_of, args), **{name: slice_of(one) for name, one in kwargs.items()})
    except RuntimeError as error:
        if MIXED not in str(error):
            raise
        raise PlanError(
            f"{watched.one.name!r} is sharded here, and {function.__name__} is given a plain tensor that is not of its"
            f" shape {tuple(values.shape)}; expand it, or write in"
            " `with self.trainer.strategy.full_parameters():`."
        ) from error


def write_item(watched: Watched, values: Tensor, index: Any, value: Any) -> None:
    """Write into the shard what assigning to an item of the full parameter changes; a collective.

    Args:
        watched: the parameter.
        values: the shard's values.
        index: the index of the item in the full parameter.
        value: the item.
    """
    shard = watched.one.shard
    watched.settle()
    with torch.no_grad():
        whole = full(shard, order_of(shard)).clone()
        whole[index] = full(value)
        _overwrite(watched, values, whole)


def fill_randomly(watched: Watched, method: str, values: Tensor, *args: Any, **kwargs: Any) -> None:
    """Fill the shard with its slice of the random numbers that a plain run draws.

    Args:
        watched: the parameter.
        method: the name of the tensor method that draws them.
        values: the shard's values.
        *args: arguments of the method.
        **kwargs: keyword arguments of the method.
    """
    shard = watched.one.shard
    whole = torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)
    getattr(whole, method)(*args, **kwargs)
    with torch.no_grad():
        _overwrite(watched, values, whole)


def _overwrite(watched: Watched, values: Tensor, whole: Tensor) -> None:
    shard = watched.one.shard
    with watched.writing_shard():
        increment_version(values)
        compat.local_tensor(shard).copy_(compat.local_tensor(divided(whole, shard, order_of(shard))))
