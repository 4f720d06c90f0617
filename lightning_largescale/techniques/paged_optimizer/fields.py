"""Fields of paged optimizer state.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (the memory hierarchy); Ren et al. 2021, "ZeRO-Offload",
    section 4 (the step on the host).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.techniques.plan_fields import (
    TIERS,
    Heap,
    PlanFields,
    as_bytes,
    check_amount,
    check_choice,
    check_flag,
    refuse_together,
)

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan


@dataclass(frozen=True, kw_only=True)
class PagedOptimizerFields(PlanFields):
    """Tiers of the optimizer state.

    Attributes:
        offload_optimizer: tier of the optimizer state, which is paged in and out around each step.
        host_optimizer_step: whether parameters with offloaded state are stepped in DRAM by the CPU cores, to which
            their gradients are copied; otherwise their state is copied to the device. Ignored on the CPU.
        resident_optimizer_bytes: bytes of a rank's optimizer state that stay on the device, in entire pages; None: 0.
            It may be given as text, such as "2GiB", as the next.
        cpu_optimizer_bytes: bytes of the optimizer state offloaded with "nvme" that are kept in DRAM.
    """

    __slots__ = ()
    offload_optimizer: str | None = None
    host_optimizer_step: bool = False
    resident_optimizer_bytes: int | None = None
    cpu_optimizer_bytes: int | None = None

    @staticmethod
    def _check(plan: Plan) -> Mapping[str, object]:
        check_choice(plan, "offload_optimizer", TIERS)
        check_flag(plan, "host_optimizer_step")
        return as_bytes(plan, "resident_optimizer_bytes", "cpu_optimizer_bytes")

    @staticmethod
    def _check_combination(plan: Plan) -> None:
        check_amount(plan, "resident_optimizer_bytes", "offload_optimizer", ("cpu", "nvme"))
        check_amount(plan, "cpu_optimizer_bytes", "offload_optimizer", ("nvme",))
        if not plan.host_optimizer_step:
            return
        if plan.offload_optimizer is None:
            raise PlanError(
                "host_optimizer_step=True contradicts offload_optimizer=None; give 'cpu' or 'nvme' there, or leave it"
                " out."
            )
        refused = {"precision": plan.scales_gradients}
        refuse_together(plan, "host_optimizer_step", refused, ", whose scaler is on the device")

    @staticmethod
    def _words(plan: Plan) -> Iterable[str]:
        if plan.offload_optimizer is not None:
            part = "part of " if plan.resident_optimizer_bytes else ""
            yield f"{part}optimizer state on {plan.offload_optimizer}"
        if plan.host_optimizer_step:
            yield "stepped on by the host"

    @staticmethod
    def _last_resort(plan: Plan) -> bool:
        return plan.offload_optimizer is not None

    @staticmethod
    def _heap(plan: Plan) -> Heap:
        return "watched" if plan.offload_optimizer is not None else "left"
