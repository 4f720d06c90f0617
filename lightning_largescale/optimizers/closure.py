"""Evaluation of a step's closure, which runs forward and backward, before the optimizer steps on other tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Arguments:
    """Evaluate the closure among the arguments of `step`, if there is one.

    Forward and backward are the module's own, and must not see the tensors that the optimizer holds during its step.

    Args:
        args: as a hook of the step receives them, the optimizer first.
        kwargs: as a hook receives them.

    Returns:
        The arguments, with a closure that only returns the result.
    """
    return _with_closure(args, kwargs, _evaluated)


def after_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any], then: Callable[[], None]) -> _Arguments:
    """Make the closure among the arguments of `step` call `then` last; without a closure, call `then` now.

    Args:
        args: as a hook of the step receives them, the optimizer first.
        kwargs: as a hook receives them.
        then: code that must follow forward and backward.
    """

    def followed(closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            result = closure()
            then()
            return result

        return evaluate

    if _closure_of(args, kwargs) is None:
        then()
    return _with_closure(args, kwargs, followed)


def _evaluated(closure: Callable[[], Any]) -> Callable[[], Any]:
    with torch.enable_grad():
        result = closure()
    return lambda: result


def _closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure if callable(closure) else None


def _with_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> _Arguments:
    """Return the arguments of `step` with `change` of their closure in its place, if they have one."""
    closure = _closure_of(args, kwargs)
    if closure is None:
        return args, dict(kwargs)
    if len(args) > 1:
        return (args[0], change(closure), *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": change(closure)}
