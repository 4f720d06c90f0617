"""Numbers about a model that is spread over ranks, as torch's and Lightning's own functions take them of plain tensors.

`lightning.pytorch.utilities.grad_norm` makes plain tensors of norms, `torch.nn.utils.clip_grad_norm_` takes gradients
together of which some are DTensors and some are not, a GradScaler likewise: none of them can. Nor do they take sparse
gradients, as those of row-sharded tables are, of which each rank has its rows.
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
    """Within, a number that torch makes of a DTensor, or a norm of the gradient of a row-sharded table, is a plain
    tensor, equal on all ranks; making it is a collective.

    Functions that take several gradients take those divided and those whole together. A number that is copied from a
    device to DRAM is there at once. What torch.compile traces is computed as without.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, with what it cannot take taken apart."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # A graph would break at every function that is looked up; blocks compute with gathered, plain tensors.
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

    GradScaler and fused optimizers copy their scale without blocking, and kernels of the CPU read it then.
    """
    if source.is_cuda and not copy.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()


def _whole(result: Any) -> Any:
    return _full(result) if isinstance(result, DTensor) and result.dim() == 0 else result


def _full(tensor: Tensor) -> Tensor:
    return full(tensor) if isinstance(tensor, DTensor) else tensor


def _has_rows(tensor: object) -> bool:
    """Whether it is the gradient of a row-sharded table."""
    return isinstance(tensor, Tensor) and rows_of(tensor) is not None and tensor.is_sparse


def _values(tensor: Tensor) -> Tensor:
    """What each rank's elements are in, sharing storage."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if not _has_rows(tensor):
        return tensor
    if not tensor.is_coalesced():
        # Gradients are when they are marked; torch has it that `mul_` leaves them so no more, and `add_` may not.
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
    """The norm of all rows, each counted once.

    Raises:
        PlanError: another norm is asked for than one of all elements, of an order that zeros do not change.
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
    # Of no element there is no largest.
    own: Tensor = torch.linalg.vector_norm(torch.cat([values, values.new_zeros(1)]), order, dtype=dtype)
    if order == torch.inf:
        # The greatest of NaN and a number is the number where a backend compares them.
        every = [torch.empty_like(own) for _ in range(comm.world_size())]
        comm.all_gather(every, own)
        return torch.stack(every).max()
    if order == 0:
        # A number of elements.
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
    """Norms of each, with one collective for those of one mesh, and one for each table."""
    order = kwargs.get("ord", order)
    if order == torch.inf:
        # Of shards the norm would be the greatest of the ranks', and lose a NaN; of one that is empty there is none.
        tensors = [_full(tensor) for tensor in tensors]
    found: dict[int, Tensor] = {
        index: _norm(function, tensor, order, dtype=dtype) for index, tensor in enumerate(tensors) if _has_rows(tensor)
    }
    for indices in _by_mesh(tensors):
        if indices[0] in found:
            continue
        norms = function([tensors[index] for index in indices], order, dtype=dtype)
        if isinstance(norms[0], DTensor):
            norms = _full(torch.stack(norms)).unbind()
        found |= dict(zip(indices, norms, strict=True))
    return [found[index] for index in range(len(tensors))]


def _unscale(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any) -> None:
    for indices in _by_mesh(tensors):
        function([tensors[index] for index in indices], *args)


def _in_place(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Element by element, so that each rank does its own."""
    others = [leaf for leaf in compat.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(isinstance(other, DTensor) or other.is_sparse for other in others):
        # Such as are of other rows than the first.
        return function(tensors, *args, **kwargs)
    return function([_values(tensor) for tensor in tensors], *args, **kwargs)


def _clamp(function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What is not there is zero, and stays it where zero lies within the bounds."""
    function(_values(tensor), *args, **kwargs)
    return tensor


def _alike(function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What is again the gradient of the table's rows: it itself, a copy, or one times a number."""
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
    # Operators come as these.
    **dict.fromkeys((torch.mul, Tensor.mul, torch.div, Tensor.div), _alike),
}
_CALLS: dict[str, Callable[..., Any]] = {"norms": _norms, "unscale": _unscale, "in place": _in_place}


def _by_mesh(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that can be taken together, in an order that is the same on all ranks."""
    groups: dict[object, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kind = tensor.device_mesh if isinstance(tensor, DTensor) else "table" if _has_rows(tensor) else None
        groups.setdefault(kind, []).append(index)
    return list(groups.values())
