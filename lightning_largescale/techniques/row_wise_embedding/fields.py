"""Field of embedding tables whose rows are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.techniques.plan_fields import PlanFields, check_modules, counted, refuse_together

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RowWiseEmbeddingFields(PlanFields):
    """Tables whose rows are sharded over all ranks.

    Attributes:
        row_sharded_embeddings: names of `nn.Embedding` and `nn.EmbeddingBag` modules whose rows are sharded over all
            devices and looked up by an exchange of ids; their gradients are sparse. Ignored on one device.
    """

    __slots__ = ()
    row_sharded_embeddings: tuple[str, ...] = ()

    @staticmethod
    def _check(plan: Plan) -> Mapping[str, object]:
        return check_modules(plan, "row_sharded_embeddings")

    @staticmethod
    def _check_combination(plan: Plan) -> None:
        if plan.row_sharded_embeddings:
            refused = {
                "tp": plan.tp > 1,
                "precision": plan.scales_gradients,
                "offload_optimizer": plan.offload_optimizer is not None,
                "offload_parameters": plan.offload_parameters is not None,
                "release_gradients": plan.release_gradients,
            }
            refuse_together(plan, "row_sharded_embeddings", refused)

    @staticmethod
    def _words(plan: Plan) -> Iterable[str]:
        count = len(plan.row_sharded_embeddings) if plan.world_size > 1 else 0
        return (counted(count, "row-sharded table"),) if count else ()
