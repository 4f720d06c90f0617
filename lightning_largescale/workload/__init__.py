"""Workload: the resources that one step of a module needs, and the sharding that its structure permits."""

from __future__ import annotations

from lightning_largescale.workload.blocks import Group, find_blocks, find_groups, find_wraps
from lightning_largescale.workload.workload import Divided, OptimizerNeeds, Parameter, Segment, Step, Workload

__all__ = [
    "Divided",
    "Group",
    "OptimizerNeeds",
    "Parameter",
    "Segment",
    "Step",
    "Workload",
    "find_blocks",
    "find_groups",
    "find_wraps",
]
