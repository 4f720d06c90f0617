"""Budgets of one rank in each tier, in bytes, and the shortfalls of an estimate.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 3 (memory of each tier).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_largescale.hardware.disks import nvme_disk

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware


def tier_budgets(hardware: Hardware) -> dict[str, int]:
    """Return the bytes that one rank may keep in each usable tier other than the device.

    DRAM is a tier of its own on CUDA only. DRAM and disk need measured rates. The ranks of a node share its disk.
    """
    budgets: dict[str, int] = {}
    rates, disk = hardware.rates, nvme_disk(hardware.disks)
    if rates is None:
        return budgets
    linked = None not in (rates.host_to_device, rates.device_to_host, rates.host_memory_bandwidth)
    if hardware.kind == "cuda" and linked:
        budgets["cpu"] = hardware.dram_available_bytes
    measured = rates.disk_read is not None and rates.disk_write is not None
    if disk is not None and measured and (linked or hardware.kind == "cpu"):
        budgets["nvme"] = disk.free_bytes // hardware.ranks_per_node
    return budgets


def shortfalls(peak_bytes: Mapping[str, int], budgets: Mapping[str, float]) -> dict[str, float]:
    """Return, by tier, the bytes by which `peak_bytes` exceed `budgets`; empty if they fit."""
    over = {tier: size - budgets.get(tier, 0) for tier, size in peak_bytes.items()}
    return {tier: size for tier, size in over.items() if size > 0}
