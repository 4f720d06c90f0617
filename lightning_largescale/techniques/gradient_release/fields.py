"""Field of gradient release.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources", section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.techniques.plan_fields import Heap, PlanFields, check_flag, refuse_together

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan


@dataclass(frozen=True, kw_only=True)
class GradientReleaseFields(PlanFields):
    """Updates in backward.

    Attributes:
        release_gradients: whether to update a block's parameters as soon as its gradients are complete in backward, and
            free these gradients.
    """

    __slots__ = ()
    release_gradients: bool = False

    @staticmethod
    def _check(plan: Plan) -> Mapping[str, object]:
        check_flag(plan, "release_gradients")
        return {}

    @staticmethod
    def _check_combination(plan: Plan) -> None:
        if plan.release_gradients:
            replicas = plan.dp_replicate > 1 and not plan.shards
            refused = {"precision": plan.scales_gradients, "dp_replicate": replicas}
            refuse_together(plan, "release_gradients", refused, ", which needs all gradients at once")

    @staticmethod
    def _words(plan: Plan) -> Iterable[str]:
        return ("gradients released",) if plan.release_gradients else ()

    @staticmethod
    def _last_resort(plan: Plan) -> bool:
        return plan.release_gradients

    @staticmethod
    def _heap(plan: Plan) -> Heap:
        return "watched" if plan.release_gradients else "left"
