"""Fields of the offload of activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.plan_fields import (
    TIERS,
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
class ActivationOffloadFields(PlanFields):
    """Tier of the activations.

    Attributes:
        offload_activations: tier of the tensors that blocks save for backward.
        offloaded_blocks: names of the blocks whose activations are offloaded; None: all.
    """

    __slots__ = ()
    _heap = "mapped"
    _last_resort = _to_tiers = True
    offload_activations: str | None = None
    offloaded_blocks: tuple[str, ...] | None = None

    def _in_use(self) -> bool:
        return self.offload_activations is not None

    def _check_values(self) -> Mapping[str, object]:
        check_choice(self, "offload_activations", TIERS)
        blocks = self.offloaded_blocks
        if blocks is None:
            return {}
        if self.offload_activations is None:
            raise PlanError(
                f"offloaded_blocks={blocks!r} contradicts offload_activations=None; give 'cpu' or 'nvme' there, or no"
                " blocks."
            )
        if not blocks or not are_names(blocks):
            raise PlanError(
                f"offloaded_blocks={blocks!r} is not accepted; give the names of the blocks, at least one and each"
                " once, or None for all."
            )
        return {"offloaded_blocks": tuple(blocks)}

    def _check_blocks(self, blocks: Collection[str]) -> None:
        check_names_of_blocks(self, "offloaded_blocks", blocks)

    def _check_workload(self, workload: Workload) -> None:
        if self.offload_activations is not None:
            check_has_blocks(self, "offload_activations", workload, None)

    def _words(self) -> Iterable[str]:
        if self.offload_activations is None:
            return ()
        blocks = f" of {counted(len(self.offloaded_blocks), 'block')}" if self.offloaded_blocks else ""
        return (f"activations{blocks} on {self.offload_activations}",)
