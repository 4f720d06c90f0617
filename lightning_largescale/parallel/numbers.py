"""Let torch's and Lightning's functions compute global norms and scalars of sharded tensors.

`lightning.pytorch.utilities.grad_norm` makes plain tensors of norms, and `torch.nn.utils.clip_grad_norm_` and
GradScaler take DTensor and plain gradients in one list: without this mode all of them fail. They also fail on the
sparse gradients of row-sharded tables, of which each rank has its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_largescale import comm, compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.order import full
from lightning_largescale.parallel.rows import mark_rows, rows_of


class WholeNumbers(TorchFunctionMode):
    """Function mode that makes scalars of DTensors, and norms of row-sharded gradients, plain tensors.

    The scalars are equal on all ranks; computing one is a collective. Functions that take a list of gradients accept
    sharded and unsharded ones together. A scalar that is copied from a device to DRAM is complete when the copy
    returns. Functions that torch.compile traces are left alone.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or the replacement for arguments that it cannot take."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # Each lookup of a function would break the graph; blocks compute with gathered, plain tensors.
            return func(*args, **kwargs)
        kind = compat.foreach_kind(func)
        if kind is not None and any(isinstance(tensor, DTensor) or _has_rows(tensor) for tensor in args[0]):
            return _CALLS[kind](func, *args, **kwargs)
        if func in _OF_ROWS and _has_rows(args[0]):
            return _OF_ROWS[func](func, *args, **kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.to and not result.dim():
            _wait_for(args[0], result)
        return _whole(result)


def _wait_for(source: Tensor, copy: Tensor) -> None:
    """Wait until a copy in DRAM has the values of its source on a device.

    GradScaler and fused optimizers copy their scale without blocking, and CPU kernels then read it.
    """
    if source.is_cuda and not copy.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()


def _whole(result: Any) -> Any:
    return full(result) if isinstance(result, DTensor) and result.dim() == 0 else result


def _has_rows(tensor: object) -> bool:
    """Return whether `tensor` is the gradient of a row-sharded table."""
    return isinstance(tensor, Tensor) and rows_of(tensor) is not None and tensor.is_sparse


def _values(tensor: Tensor) -> Tensor:
    """Return this rank's elements of `tensor`, sharing storage."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if not _has_rows(tensor):
        return tensor
    if not tensor.is_coalesced():
        # Gradients are coalesced when they are marked; `mul_` clears torch's flag, and `add_` may.
        with torch.no_grad():
            tensor.copy_(tensor.coalesce())
    return tensor.values()


def _norm(
    function: Callable[..., Any],
    tensor: Tensor,
    order: Any = 2.0,
    *args: Any,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return the norm over the rows of all ranks; a collective.

    Raises:
        PlanError: the order is negative or a string, or arguments ask for something other than a norm of all elements.
    """
    order = kwargs.pop("ord", kwargs.pop("p", order))
    order = 2.0 if order in (None, "fro") else order
    unlike = [value for value in (*args, *kwargs.values()) if value is not None and value is not False]
    if unlike or isinstance(order, str) or order < 0:
        raise PlanError(
            f"{function.__name__} of the gradient of a row-sharded table was given the order {order!r}"
            f"{f' and {unlike}' if unlike else ''}; give an order of 0 or more, without dim, keepdim and out."
        )
    values = _values(tensor).flatten()
    # The infinity norm of an empty tensor raises, hence the additional zero.
    own: Tensor = torch.linalg.vector_norm(torch.cat([values, values.new_zeros(1)]), order, dtype=dtype)
    if order == torch.inf:
        # A backend's MAX may drop a NaN.
        every = [torch.empty_like(own) for _ in range(comm.world_size())]
        comm.all_gather(every, own)
        return torch.stack(every).max()
    if order == 0:
        # The counts of nonzero elements add up.
        comm.all_reduce(own)
        return own
    total = own.pow(order)
    comm.all_reduce(total)
    return total.pow(1 / order)


def _norms(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    order: Any = 2.0,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> list[Tensor]:
    """Return the norm of each tensor, with one collective per mesh and one per row-sharded table."""
    order = kwargs.get("ord", order)
    if order == torch.inf:
        # The maximum over the ranks' shards would lose a NaN, and the norm of an empty shard raises.
        tensors = [full(tensor) for tensor in tensors]
    found: dict[int, Tensor] = {
        index: _norm(function, tensor, order, dtype=dtype) for index, tensor in enumerate(tensors) if _has_rows(tensor)
    }
    for indices in _by_mesh(tensors):
        if indices[0] in found:
            continue
        norms = function([tensors[index] for index in indices], order, dtype=dtype)
        if isinstance(norms[0], DTensor):
            norms = full(torch.stack(norms)).unbind()
        found |= dict(zip(indices, norms, strict=True))
    return [found[index] for index in range(len(tensors))]


def _unscale(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any) -> None:
    for indices in _by_mesh(tensors):
        function([tensors[index] for index in indices], *args)


def _in_place(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Apply an element-wise in-place function to this rank's elements."""
    others = [leaf for leaf in compat.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(other, DTensor) or other.is_sparse for other in others):
        # Their elements may not match those of `tensors`, as where sparse operands have other rows.
        return function(tensors, *args, **kwargs)
    return function([_values(tensor) for tensor in tensors], *args, **kwargs)


def _clamp(function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Clamp the stored rows; the others are zero and stay so if the bounds include zero."""
    function(_values(tensor), *args, **kwargs)
    return tensor


def _alike(function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call `function`, and mark its result with the table's rows if it is a view, a copy or a scalar multiple."""
    rows = rows_of(tensor)
    assert rows is not None
    result = function(tensor, *args, **kwargs)
    others = [leaf for leaf in compat.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return mark_rows(result, rows) if result.is_sparse and not any(other.dim() for other in others) else result


_OF_ROWS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.vector_norm: _norm,
    torch.norm: _norm,
    Tensor.norm: _norm,
    Tensor.clamp_: _clamp,
    Tensor.data.__get__: _alike,  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.detach, torch.clone, Tensor.clone), _alike),
    # The operators * and / dispatch as these.
    **dict.fromkeys((torch.mul, Tensor.mul, torch.div, Tensor.div), _alike),
}
_CALLS: dict[str, Callable[..., Any]] = {"norms": _norms, "unscale": _unscale, "in place": _in_place}


def _by_mesh(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group the indices of tensors that one call can take, in the same order on all ranks."""
    groups: dict[object, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kind = tensor.device_mesh if isinstance(tensor, DTensor) else "table" if _has_rows(tensor) else None
        groups.setdefault(kind, []).append(index)
    return list(groups.values())
