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

# Those of torch's own whose step on the CPU may be one kernel.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class UntriedError(PlanError):
    """A copy of an optimizer did not step on small tensors, or changed nothing there."""


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether hooks that run between setup and the first step may change how `optimizer` steps.

    Some raise, or do nothing, until `train()` is called (schedule-free ones) or an attribute is set; those of torch do
    not.
    """
    return not type(optimizer).__module__.startswith("torch.optim.")


def closure_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `step` whose closure, if there is one, has been evaluated and only tells its result.

    The closure runs forward and backward, which are the module's own and know nothing of what a step is given.

    Args:
        args: as a hook of the step gets them, the optimizer first.
        kwargs: as a hook gets them.
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
    """Arguments of `step` whose closure, if there is one, calls `then` last; else it is called now.

    Args:
        args: as a hook of the step gets them, the optimizer first.
        kwargs: as a hook gets them.
        then: what must follow forward and backward.
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
    """An optimizer that steps as `optimizer` does, over other parameters, without its state and hooks.

    What it keeps beside is shared, but for lists of its parameters and optimizers that it wraps.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    defaults = dict(optimizer.defaults)
    clone = copy.copy(optimizer)
    # Copying adds one to those that the two have in common, which groups that come later would be given.
    clone.defaults, optimizer.defaults = optimizer.defaults, defaults
    clone.state, clone.param_groups = defaultdict(dict), param_groups
    for name, value in vars(optimizer).items():
        # A scheduler wraps the method of the object that it was given.
        if name == "step" or name in vars(clone):
            continue
        if isinstance(value, Optimizer):
            value = clone_of(value, param_groups)
        elif isinstance(value, list) and any(id(item) in own for item in value):
            value = [parameter for group in param_groups for parameter in group["params"]]
        setattr(clone, name, value)
    return clone


def bare_step(optimizer: Optimizer) -> Callable[[], Any]:
    """`optimizer.step` without the hooks around it, and without what a scheduler has put there to count its calls."""
    step = type(optimizer).step
    # What torch wraps it in calls the hooks.
    inner = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    return inner.__get__(optimizer)  # type: ignore[no-any-return]


def hold(group: dict[str, Any], options: Mapping[str, Any], parameters: list[Any]) -> None:
    """Let a group of an optimizer have `options` and nothing else beside `parameters`; it stays the same dict.

    A step on all parameters finds the group as it was before; so must one on a part of them after one on another part.
    """
    group.clear()
    group.update({"params": parameters, **options})


def vectorized(optimizer: Optimizer, options: Mapping[str, Any], *, floating: bool = True) -> dict[str, Any]:
    """`options` of a group for a step on the CPU: one kernel, if `optimizer` is one of torch's own that has one there
    and the user has left open which implementation it takes.

    Args:
        optimizer: whose group it is.
        options: without the parameters.
        floating: these are real numbers.

    Source: torch.optim, Algorithms ("fused" of Adam, AdamW, SGD and Adagrad).
    """
    given = dict(options)
    if isinstance(rate := given.get("lr"), Tensor):
        given["lr"] = rate.cpu()
    chosen = given.get("foreach") is not None or given.get("differentiable") or given.get("capturable")
    # With a momentum, the kernel takes no parameter whose first gradient comes later than those of others.
    known = type(optimizer) in FUSED and not given.get("momentum")
    if not known or chosen or given.get("fused", False) is not None or not floating:
        return given
    return {**given, "foreach": False, "fused": True}


def in_words(error: Exception) -> str:
    """The kind of an error and the first sentence of its message."""
    first = (str(error).splitlines() or [""])[0].split(". ")[0]
    return f"{type(error).__name__}: {first.removesuffix('.')}"
