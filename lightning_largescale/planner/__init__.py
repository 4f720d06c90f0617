"""Planner: pure functions that price plans on given hardware for a given workload, and rank them."""

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
