"""Rules of functions along a dimension that is not sharded: sums, softmax, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_largescale.workload.parts.engine import OnParts, Rule, any_part
from lightning_largescale.workload.parts.part import as_part, part_of

# The dimension is the second argument, or the third (`_THIRD`).
_REMOVE = [
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "logsumexp",
    "max",
    "mean",
    "median",
    "min",
    "prod",
    "std",
    "sum",
    "var",
]
_KEEP = ["argsort", "cummax", "cummin", "cumprod", "cumsum", "log_softmax", "logcumsumexp", "softmax", "sort"]
_REMOVE_THIRD, _KEEP_THIRD = ["norm"], ["topk", "normalize"]


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    found: dict[Callable[..., Any], Rule] = {}
    for listed, position, keeps in (
        (_REMOVE, 1, False),
        (_KEEP, 1, True),
        (_REMOVE_THIRD, 2, False),
        (_KEEP_THIRD, 2, True),
    ):
        rule = _Along(position, keeps=keeps)
        found |= {
            getattr(place, name): rule for name in listed for place in (torch, torch.Tensor, F) if hasattr(place, name)
        }
    found[torch.linalg.vector_norm] = _Along(2, keeps=False)
    # Default dimensions: 1 of normalize, the last of topk.
    found[F.normalize] = _Along(2, keeps=True, default=1)
    found |= {torch.topk: _Along(2, keeps=True, default=-1), torch.Tensor.topk: _Along(2, keeps=True, default=-1)}
    return found | {F.layer_norm: _normalized, torch.layer_norm: _normalized, F.rms_norm: _normalized}


class _Along:
    """The rule of functions along dimensions; the result has these dimensions if `keeps`, or if `keepdim` is given."""

    def __init__(self, position: int, *, keeps: bool, default: int | None = None) -> None:
        self._position, self._keeps, self._default = position, keeps, default

    def __call__(self, engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        part = part_of(args[0]) if args else None
        given = kwargs.get("dim", args[self._position] if len(args) > self._position else self._default)
        others = [*args[1:], *kwargs.values()]
        # A bool in place of the dimension belongs to another signature.
        if (
            part is None
            or given is None
            or isinstance(given, str | bool)
            or any(isinstance(one, Tensor) for one in others)
        ):
            return NotImplemented
        dims = args[0].dim()
        along = {dim % dims for dim in ([given] if isinstance(given, int) else given)}
        if part.dim in along or not along:
            return NotImplemented
        result = func(*args, **kwargs)
        first = result if isinstance(result, Tensor) else result[0]
        gone = 0 if self._keeps or first.dim() == dims else sum(dim < part.dim for dim in along)
        if isinstance(result, Tensor):
            return as_part(result, part.at(part.dim - gone))
        for one in result:
            as_part(one, part.at(part.dim - gone))
        return result


def _normalized(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    part = part_of(args[0])
    normalized = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    if part is None or part.dim >= args[0].dim() - len(normalized) or any_part((*args[1:], *kwargs.values())):
        return NotImplemented
    rest = [engine.entered(one) if isinstance(one, Tensor) else one for one in args[1:]]
    named = {key: engine.entered(one) if isinstance(one, Tensor) else one for key, one in kwargs.items()}
    return as_part(func(args[0], *rest, **named), part)
