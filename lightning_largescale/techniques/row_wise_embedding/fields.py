"""Field of embedding tables whose rows are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_largescale.plan_fields import PlanFields, check_modules, counted, refuse_together


@dataclass(frozen=True, kw_only=True)
class RowWiseEmbeddingFields(PlanFields):
    """Tables whose rows are sharded over all ranks.

    Attributes:
        row_sharded_embeddings: names of `nn.Embedding` and `nn.EmbeddingBag` modules whose rows are sharded over all
            devices and looked up by an exchange of ids; their gradients are sparse. Ignored on one device.
    """

    __slots__ = ()
    row_sharded_embeddings: tuple[str, ...] = ()

    def _check_values(self) -> Mapping[str, object]:
        return check_modules(self, "row_sharded_embeddings")

    def _check_combination(self) -> None:
        if self.row_sharded_embeddings:
            refused = {
                "tp": self._plan.tp > 1,
                "precision": self._plan.scales_gradients,
                "offload_optimizer": self._plan.offload_optimizer is not None,
                "offload_parameters": self._plan.offload_parameters is not None,
                "release_gradients": self._plan.release_gradients,
            }
            refuse_together(self, "row_sharded_embeddings", refused)

    def _words(self) -> Iterable[str]:
        count = len(self.row_sharded_embeddings) if self._plan.world_size > 1 else 0
        return (counted(count, "row-sharded table"),) if count else ()
