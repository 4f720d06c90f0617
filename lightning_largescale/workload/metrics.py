"""torchmetrics inside a step on fake tensors: a metric that needs values is passed over, for it holds little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_largescale import compat


def forgive_metrics(module: nn.Module) -> list[str]:
    """Let each metric in `module` do nothing where it needs the values of tensors; call while it is untouched.

    Checks of their arguments, which read values, are switched off where a metric has a switch.

    Returns:
        A list that gains a sentence when a metric had to be passed over.
    """
    notes: list[str] = []
    for child in module.modules():
        if isinstance(child, Metric):
            if "validate_args" in child.__dict__:
                child.__dict__["validate_args"] = False
            for name in ("update", "compute"):
                child.__dict__[name] = _forgiving(child, getattr(child, name), notes)
    return notes


def _forgiving(metric: Metric, method: Callable[..., Any], notes: list[str]) -> Callable[..., Any]:
    errors = compat.data_dependent_errors()

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except errors:
            note = f"{type(metric).__name__} needs values, so its own memory is left out"
            if note not in notes:
                notes.append(note)
            return torch.zeros(())

    return call
