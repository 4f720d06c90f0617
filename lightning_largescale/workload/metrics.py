"""torchmetrics inside a step on fake tensors: a metric that needs values is skipped, since it holds little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_largescale import compat


def forgive_metrics(module: nn.Module) -> list[str]:
    """Make each metric in `module` skip what needs the values of tensors; call within `Snapshot.untouched`.

    Metrics' checks of arguments, which read values, are switched off where a metric has a switch.

    Returns:
        A list that receives a sentence when a metric is skipped.
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
