"""Planner: pure functions that price plans on given hardware for a given workload, and rank them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_largescale.planner.peak_memory import MemoryEstimate, peak_memory
    from lightning_largescale.planner.report import Candidate, Estimate, Report
    from lightning_largescale.planner.runtime import TimeEstimate, step_time
    from lightning_largescale.planner.search import find_plans

__all__ = [
    "Candidate",
    "Estimate",
    "MemoryEstimate",
    "Report",
    "TimeEstimate",
    "find_plans",
    "peak_memory",
    "step_time",
]


def __getattr__(name: str) -> Any:
    # Prices of techniques import modules of the planner, and are imported by others.
    homes = ("peak_memory", "report", "runtime", "search") if name in __all__ else ()
    for home in homes:
        module = import_module(f"{__name__}.{home}")
        if name in vars(module):
            return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
