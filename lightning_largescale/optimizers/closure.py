"""Evaluation of a step's closure, which runs forward and backward, before the optimizer steps.

Forward and backward are the module's own, and must not see the tensors that an optimizer holds during its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from lightning_largescale.optimizers.trial import has_modes

_Closure = Callable[[], Any]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def evaluate_first(optimizer: Optimizer, closure: _Closure, *, paged: bool = False) -> _Closure:
    """Evaluate `closure`, and return one that only returns the result.

    An optimizer that may evaluate it again, or later in its step, gets it as it is. Those of torch evaluate it once and
    first, except for LBFGS, and others must if they step on shards or pages.

    Args:
        optimizer: the optimizer, without Lightning's wrapper.
        closure: the closure that runs forward and backward.
        paged: whether the optimizer steps page by page.
    """
    sharded = any(isinstance(one, DTensor) for group in optimizer.param_groups for one in group["params"])
    plain = isinstance(optimizer, LBFGS) or has_modes(optimizer)
    return closure if plain and not (sharded or paged) else _evaluated(closure)


def closure_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Arguments:
    """Evaluate the closure among the arguments of `step`, as a hook of the step receives them, if there is one.

    Returns:
        The arguments, with a closure that only returns the result.
    """
    return _replaced(args, kwargs, _evaluated)


def after_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any], then: Callable[[], None]) -> _Arguments:
    """Return the arguments of `step` with a closure that calls `then` last; without a closure, call `then` now."""
    found = []

    def followed(closure: _Closure) -> _Closure:
        def evaluate() -> Any:
            result = closure()
            then()
            return result

        found.append(closure)
        return evaluate

    result = _replaced(args, kwargs, followed)
    if not found:
        then()
    return result


def _evaluated(closure: _Closure) -> _Closure:
    with torch.enable_grad():
        result = closure()
    return lambda: result


def _replaced(args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[_Closure], _Closure]) -> _Arguments:
    by_position = len(args) > 1
    closure = args[1] if by_position else kwargs.get("closure")
    if not callable(closure):
        return args, dict(kwargs)
    if by_position:
        return (args[0], change(closure), *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": change(closure)}
