"""All rules by function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_largescale.workload.parts import attention, hooks, pointwise, products, reductions, views, vocabulary
from lightning_largescale.workload.parts.engine import Rule


def all_rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function; if two modules have one for a function, the later module's counts."""
    modules = (pointwise, views, reductions, products, attention, vocabulary, hooks)
    return {func: rule for module in modules for func, rule in module.rules().items()}
