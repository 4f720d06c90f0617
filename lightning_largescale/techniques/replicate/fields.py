"""Field of data parallelism over replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.techniques.plan_fields import Heap, PlanFields, check_count

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ReplicateFields(PlanFields):
    """Replicas of the model.

    Attributes:
        dp_replicate: number of groups of devices that each hold the full model; their gradients are averaged.
    """

    __slots__ = ()
    dp_replicate: int = 1

    @staticmethod
    def _check(plan: Plan) -> Mapping[str, object]:
        check_count(plan, "dp_replicate", "devices")
        return {}

    @staticmethod
    def _layout_words(plan: Plan, inner: str) -> str:
        if plan.dp_replicate == 1:
            return inner
        if inner:
            return f"HSDP: {plan.dp_replicate} replicas, each {inner}"
        return f"replicated on {plan.dp_replicate} devices"

    @staticmethod
    def _heap(plan: Plan) -> Heap:
        return "trimmed" if plan.dp_replicate > 1 else "left"
