"""Numbers about a model that is spread over ranks, as torch's and Lightning's own functions take them of plain tensors.

`lightning.pytorch.utilities.grad_norm` makes plain tensors of norms, `torch.nn.utils.clip_grad_norm_` takes gradients
together of which some are DTensors and some are not, a GradScaler likewise: none of them can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_largescale import compat
from lightning_largescale.parallel.order import full


class WholeNumbers(TorchFunctionMode):
    """Within, a number that torch makes of a DTensor is a plain tensor, equal on all ranks; making it is a collective.

    Functions that take several gradients take those divided and those whole together. What torch.compile traces is
    computed as without.
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
        if kind is not None and any(isinstance(tensor, DTensor) for tensor in args[0]):
            return _CALLS[kind](func, *args, **kwargs)
        return _whole(func(*args, **kwargs))


def _whole(result: Any) -> Any:
    return _full(result) if isinstance(result, DTensor) and result.dim() == 0 else result


def _full(tensor: Tensor) -> Tensor:
    return full(tensor) if isinstance(tensor, DTensor) else tensor


def _norms(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Norms of each, with one collective for those of one mesh."""
    found: dict[int, Tensor] = {}
    for indices in _by_mesh(tensors):
        norms = function([tensors[index] for index in indices], *args, **kwargs)
        if isinstance(norms[0], DTensor):
            norms = _full(torch.stack(norms)).unbind()
        found |= dict(zip(indices, norms, strict=True))
    return [found[index] for index in range(len(tensors))]


def _unscale(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any) -> None:
    for indices in _by_mesh(tensors):
        function([tensors[index] for index in indices], *args)


def _in_place(function: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Element by element, so that each rank does its own."""
    if any(isinstance(leaf, DTensor) for leaf in compat.leaves((args, kwargs))):
        return function(tensors, *args, **kwargs)
    return function([one.to_local() if isinstance(one, DTensor) else one for one in tensors], *args, **kwargs)


_CALLS: dict[str, Callable[..., Any]] = {"norms": _norms, "unscale": _unscale, "in place": _in_place}


def _by_mesh(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that can be taken together, in an order that is the same on all ranks."""
    groups: dict[object, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(index)
    return list(groups.values())
