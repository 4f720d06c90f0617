"""Fields of the offload of parameters, and of the tiers that all offload shares.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (the memory hierarchy).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import (
    TIERS,
    PlanFields,
    as_bytes,
    check_amount,
    check_choice,
    check_count,
    check_has_blocks,
)

if TYPE_CHECKING:
    from lightning_largescale.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ParameterOffloadFields(PlanFields):
    """Tiers of the parameters of blocks.

    Attributes:
        offload_parameters: tier of the parameters of blocks while the blocks do not compute: None, the device; "cpu",
            DRAM; "nvme", a disk. Their gradients are offloaded to it too.
        nvme_path: a folder on the disk of the nvme tier; None selects the disk with the most free bytes.
        resident_parameter_bytes: bytes of a rank's parameters that stay on the device despite offload, in entire
            blocks; None: only those outside of blocks. It may be given as text, such as "2GiB", as the next.
        cpu_parameter_bytes: bytes of the parameters offloaded with "nvme" that are kept in DRAM.
        prefetched_blocks: number of blocks to prefetch ahead of the one that computes.
    """

    __slots__ = ()
    _heap = "mapped"
    _last_resort = _to_tiers = True
    offload_parameters: str | None = None
    nvme_path: str | None = None
    resident_parameter_bytes: int | None = None
    cpu_parameter_bytes: int | None = None
    prefetched_blocks: int = 1

    def _in_use(self) -> bool:
        return self.offload_parameters is not None

    def _check_values(self) -> Mapping[str, object]:
        check_choice(self, "offload_parameters", TIERS)
        check_count(self, "prefetched_blocks", "blocks")
        changed = as_bytes(self, "resident_parameter_bytes", "cpu_parameter_bytes")
        path: object = self.nvme_path
        if path is None:
            return changed
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise PlanError(f"nvme_path={path!r} is not accepted; give the path of a folder.")
        return {**changed, "nvme_path": str(os.fspath(path))}

    def _check_combination(self) -> None:
        check_amount(self, "resident_parameter_bytes", "offload_parameters", ("cpu", "nvme"))
        check_amount(self, "cpu_parameter_bytes", "offload_parameters", ("nvme",))

    def _check_workload(self, workload: Workload) -> None:
        if self.offload_parameters is not None:
            check_has_blocks(self, "offload_parameters", workload, None)

    def _words(self) -> Iterable[str]:
        if self.offload_parameters is None:
            return ()
        return (f"{'part of ' if self.resident_parameter_bytes else ''}parameters on {self.offload_parameters}",)
