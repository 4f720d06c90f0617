"""Fields of activation checkpointing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import (
    PlanFields,
    are_names,
    check_choice,
    check_has_blocks,
    check_names_of_blocks,
    counted,
)

if TYPE_CHECKING:
    from lightning_largescale.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointFields(PlanFields):
    """Blocks that recompute their forward.

    Attributes:
        activation_checkpointing: "none"; "full": every repeated block keeps its input and recomputes its forward in
            backward; "selective": the blocks in `checkpointed_blocks` do.
        checkpointed_blocks: names, as in `named_modules`, of the blocks to recompute under "selective"; None under
            "none" and "full".
        checkpointed_operations: operations that these blocks recompute: "all" of their forward, or only the "cheap"
            ones: then they keep the results of matrix products, convolutions and attention.
    """

    __slots__ = ()
    _heap = "watched"
    activation_checkpointing: str = "none"
    checkpointed_blocks: tuple[str, ...] | None = None
    checkpointed_operations: str = "all"

    def _in_use(self) -> bool:
        return self.activation_checkpointing != "none"

    def _check_values(self) -> Mapping[str, object]:
        check_choice(self, "activation_checkpointing", ("none", "selective", "full"))
        check_choice(self, "checkpointed_operations", ("all", "cheap"))
        mode, blocks = self.activation_checkpointing, self.checkpointed_blocks
        if mode == "none" and self.checkpointed_operations != "all":
            raise PlanError(
                f"checkpointed_operations={self.checkpointed_operations!r} contradicts activation_checkpointing='none';"
                " give 'full' or 'selective', or 'all' operations."
            )
        if mode != "selective":
            if blocks is not None:
                raise PlanError(
                    f"checkpointed_blocks={blocks!r} contradicts activation_checkpointing={mode!r}; give 'selective',"
                    " or no blocks."
                )
            return {}
        if not blocks or not are_names(blocks):
            raise PlanError(
                f"checkpointed_blocks={blocks!r} is not accepted with activation_checkpointing='selective';"
                " give the names of the blocks, at least one and each once."
            )
        return {"checkpointed_blocks": tuple(blocks)}

    def _check_blocks(self, blocks: Collection[str]) -> None:
        check_names_of_blocks(self, "checkpointed_blocks", blocks)

    def _check_workload(self, workload: Workload) -> None:
        if self.activation_checkpointing != "none":
            check_has_blocks(self, "activation_checkpointing", workload, "none")

    def _words(self) -> Iterable[str]:
        if self.activation_checkpointing == "none":
            return ()
        words = "full activation checkpointing"
        if self.checkpointed_blocks:
            words = f"activation checkpointing of {counted(len(self.checkpointed_blocks), 'block')}"
        return (words + (" but for products" if self.checkpointed_operations == "cheap" else ""),)
