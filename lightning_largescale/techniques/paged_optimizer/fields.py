"""Fields of paged optimizer state.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (the memory hierarchy); Ren et al. 2021, "ZeRO-Offload",
    section 4 (the step on the host).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import (
    TIERS,
    PlanFields,
    as_bytes,
    check_amount,
    check_choice,
    check_flag,
    refuse_together,
)


@dataclass(frozen=True, kw_only=True)
class PagedOptimizerFields(PlanFields):
    """Tiers of the optimizer state.

    Attributes:
        offload_optimizer: tier of the optimizer state, which is paged in and out around each step.
        cpu_optimizer_step: whether parameters with offloaded state are stepped in DRAM by the CPU cores, to which
            their gradients are copied; otherwise their state is copied to the device. Ignored on the CPU.
        resident_optimizer_bytes: bytes of a rank's optimizer state that stay on the device, in entire pages; None: 0.
            It may be given as text, such as "2GiB", as the next.
        cpu_optimizer_bytes: bytes of the optimizer state offloaded with "nvme" that are kept in DRAM.
    """

    __slots__ = ()
    _heap = "watched"
    _last_resort = _to_tiers = True
    offload_optimizer: str | None = None
    cpu_optimizer_step: bool = False
    resident_optimizer_bytes: int | None = None
    cpu_optimizer_bytes: int | None = None

    def _in_use(self) -> bool:
        return self.offload_optimizer is not None

    def _check_values(self) -> Mapping[str, object]:
        check_choice(self, "offload_optimizer", TIERS)
        check_flag(self, "cpu_optimizer_step")
        return as_bytes(self, "resident_optimizer_bytes", "cpu_optimizer_bytes")

    def _check_combination(self) -> None:
        check_amount(self, "resident_optimizer_bytes", "offload_optimizer", ("cpu", "nvme"))
        check_amount(self, "cpu_optimizer_bytes", "offload_optimizer", ("nvme",))
        if not self.cpu_optimizer_step:
            return
        if self.offload_optimizer is None:
            raise PlanError(
                "cpu_optimizer_step=True contradicts offload_optimizer=None; give 'cpu' or 'nvme' there, or leave it"
                " out."
            )
        refused = {"precision": self._plan.scales_gradients}
        refuse_together(self, "cpu_optimizer_step", refused, ", whose scaler is on the device")

    def _words(self) -> Iterable[str]:
        if self.offload_optimizer is not None:
            part = "part of " if self.resident_optimizer_bytes else ""
            yield f"{part}optimizer state on {self.offload_optimizer}"
        if self.cpu_optimizer_step:
            yield "stepped on by the host"
