"""Field of gradient release.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources", section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_largescale.plan_fields import PlanFields, check_flag, refuse_together


@dataclass(frozen=True, kw_only=True)
class GradientReleaseFields(PlanFields):
    """Updates in backward.

    Attributes:
        release_gradients: whether to update a block's parameters as soon as its gradients are complete in backward, and
            free these gradients.
    """

    __slots__ = ()
    _heap = "watched"
    _last_resort = True
    release_gradients: bool = False

    def _in_use(self) -> bool:
        return self.release_gradients

    def _check_values(self) -> Mapping[str, object]:
        check_flag(self, "release_gradients")
        return {}

    def _check_combination(self) -> None:
        if self.release_gradients:
            replicas = self._plan.dp_replicate > 1 and not self._plan.shards
            refused = {"precision": self._plan.scales_gradients, "dp_replicate": replicas}
            refuse_together(self, "release_gradients", refused, ", which needs all gradients at once")

    def _words(self) -> Iterable[str]:
        return ("gradients released",) if self.release_gradients else ()
