"""Utilities that let any optimizer step on other tensors than its own parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_largescale.errors import PlanError

# torch's optimizers with a fused kernel on the CPU.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class UntriedError(PlanError):
    """A copy of an optimizer did not step on small tensors, or changed nothing there."""


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether hooks that run between setup and the first step may change how `optimizer` steps.

    Some raise, or do nothing, until `train()` is called (schedule-free ones) or an attribute is set; torch's do not.
    """
    return not type(optimizer).__module__.startswith("torch.optim.")


def closure_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Evaluate the closure of a step, if there is one; return the arguments with a closure that returns its result.

    The closure runs forward and backward, which must not see the tensors that replace parameters during a step.

    Args:
        args: the arguments that a hook of the step receives, the optimizer first.
        kwargs: the keyword arguments that the hook receives.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return args, dict(kwargs)
    with torch.enable_grad():
        result = closure()

    def told() -> Any:
        return result

    if len(args) > 1:
        return (args[0], told, *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": told}


def after_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], then: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a step with a closure that calls `then` last; without a closure, call `then` now.

    Args:
        args: as for `closure_first`.
        kwargs: as for `closure_first`.
        then: called after forward and backward.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        then()
        return args, dict(kwargs)

    def evaluate() -> Any:
        result = closure()
        then()
        return result

    if len(args) > 1:
        return (args[0], evaluate, *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": evaluate}


def clone_of(optimizer: Optimizer, param_groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer that steps as `optimizer` on other parameters, without its state and hooks.

    Other attributes are shared, except for lists of its parameters and optimizers that it wraps.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    defaults = dict(optimizer.defaults)
    clone = copy.copy(optimizer)
    # Copying adds an entry to the shared defaults, which later groups would get.
    clone.defaults, optimizer.defaults = optimizer.defaults, defaults
    clone.state, clone.param_groups = defaultdict(dict), param_groups
    for name, value in vars(optimizer).items():
        # A scheduler has wrapped the method of the original optimizer.
        if name == "step" or name in vars(clone):
            continue
        if isinstance(value, Optimizer):
            value = clone_of(value, param_groups)
        elif isinstance(value, list) and any(id(item) in own for item in value):
            value = [parameter for group in param_groups for parameter in group["params"]]
        setattr(clone, name, value)
    return clone


def bare_step(optimizer: Optimizer) -> Callable[[], Any]:
    """Return `optimizer.step` without its hooks, and without the wrapper by which a scheduler counts its calls."""
    step = type(optimizer).step
    # torch's wrapper calls the hooks.
    inner = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    return inner.__get__(optimizer)  # type: ignore[no-any-return]


def hold(group: dict[str, Any], options: Mapping[str, Any], parameters: list[Any]) -> None:
    """Set `options` and `parameters`, and nothing else, in a group of an optimizer; it stays the same dict.

    So consecutive steps on some of the parameters start from the same group as a step on all of them.
    """
    group.clear()
    group.update({"params": parameters, **options})


def vectorized(optimizer: Optimizer, options: Mapping[str, Any], *, floating: bool = True) -> dict[str, Any]:
    """Return the options of a group for a step on the CPU, with the fused kernel where possible.

    It is possible for torch's optimizers that have one, unless the user has chosen an implementation.

    Args:
        optimizer: the group's optimizer.
        options: the group's options, without the parameters.
        floating: whether the parameters are real numbers.

    Source: torch.optim, Algorithms ("fused" of Adam, AdamW, SGD and Adagrad).
    """
    given = dict(options)
    if isinstance(rate := given.get("lr"), Tensor):
        given["lr"] = rate.cpu()
    chosen = given.get("foreach") is not None or given.get("differentiable") or given.get("capturable")
    # With a momentum, the kernel accepts no parameter whose first gradient comes later than those of others.
    known = type(optimizer) in FUSED and not given.get("momentum")
    if not known or chosen or given.get("fused", False) is not None or not floating:
        return given
    return {**given, "foreach": False, "fused": True}


def in_words(error: Exception) -> str:
    """Return the class of an error and the first sentence of its message."""
    first = (str(error).splitlines() or [""])[0].split(". ")[0]
    return f"{type(error).__name__}: {first.removesuffix('.')}"
