"""Where the store is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_largescale.hardware import Disk
from lightning_largescale.plan import Plan, PlanError


def nvme_folder(plan: Plan, disks: Sequence[Disk]) -> Path:
    """Stub until merged."""
    if plan.nvme_path is not None:
        return Path(plan.nvme_path)
    for disk in disks:
        if disk.refused is None:
            return Path(disk.path)
    raise PlanError("none")
