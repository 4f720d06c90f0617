"""Fields of the offload of activations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.errors import PlanError
from lightning_largescale.techniques.plan_fields import (
    TIERS,
    Heap,
    PlanFields,
    are_names,
    check_choice,
    check_has_blocks,
    check_names_of_blocks,
    counted,
)

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ActivationOffloadFields(PlanFields):
    """Tier of the activations.

    Attributes:
        offload_activations: tier of the tensors that blocks save for backward.
        offloaded_blocks: names of the blocks whose activations are offloaded; None: all.
    """

    __slots__ = ()
    offload_activations: str | None = None
    offloaded_blocks: tuple[str, ...] | None = None

    @staticmethod
    def _check(plan: Plan) -> Mapping[str, object]:
        check_choice(plan, "offload_activations", TIERS)
        blocks = plan.offloaded_blocks
        if blocks is None:
            return {}
        if plan.offload_activations is None:
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

    @staticmethod
    def _check_blocks(plan: Plan, blocks: Collection[str]) -> None:
        check_names_of_blocks(plan, "offloaded_blocks", blocks)

    @staticmethod
    def _check_workload(plan: Plan, workload: Workload) -> None:
        if plan.offload_activations is not None:
            check_has_blocks(plan, "offload_activations", workload, None)

    @staticmethod
    def _words(plan: Plan) -> Iterable[str]:
        if plan.offload_activations is None:
            return ()
        blocks = f" of {counted(len(plan.offloaded_blocks), 'block')}" if plan.offloaded_blocks else ""
        return (f"activations{blocks} on {plan.offload_activations}",)

    @staticmethod
    def _last_resort(plan: Plan) -> bool:
        return plan.offload_activations is not None

    @staticmethod
    def _heap(plan: Plan) -> Heap:
        return "mapped" if plan.offload_activations is not None else "left"
