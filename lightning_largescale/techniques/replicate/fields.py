"""Field of data parallelism over replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_largescale.plan_fields import PlanFields, check_count


@dataclass(frozen=True, kw_only=True)
class ReplicateFields(PlanFields):
    """Replicas of the model.

    Attributes:
        dp_replicate: number of groups of devices that each hold the full model; their gradients are averaged.
    """

    __slots__ = ()
    _heap = "trimmed"
    dp_replicate: int = 1

    def _in_use(self) -> bool:
        return self.dp_replicate > 1

    def _check_values(self) -> Mapping[str, object]:
        check_count(self, "dp_replicate", "devices")
        return {}

    def _layout_words(self, inner: str) -> str:
        if self.dp_replicate == 1:
            return inner
        if inner:
            return f"HSDP: {self.dp_replicate} replicas, each {inner}"
        return f"replicated on {self.dp_replicate} devices"
