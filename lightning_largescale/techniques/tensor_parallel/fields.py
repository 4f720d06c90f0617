"""Fields of tensor parallelism.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (tensor parallelism); Korthikanti et al. 2022, "Reducing
    Activation Recomputation in Large Transformer Models", section 4.2.2 (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_largescale.techniques.plan_fields import Heap, PlanFields, check_count, check_flag

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan


@dataclass(frozen=True, kw_only=True)
class TensorParallelFields(PlanFields):
    """Shards of the matrices of blocks.

    Attributes:
        tp: number of devices that the matrices of blocks are sharded over (tensor parallel), each computing its part of
            every sample.
        sequence_parallel: whether each tensor-parallel rank computes and keeps a part of the sequence between these
            matrices (norms, residuals), where all ranks would compute the same. Ignored with `tp=1`.
    """

    __slots__ = ()
    tp: int = 1
    sequence_parallel: bool = False

    @staticmethod
    def _check(plan: Plan) -> Mapping[str, object]:
        check_count(plan, "tp", "devices")
        check_flag(plan, "sequence_parallel")
        return {}

    @staticmethod
    def _layout_words(plan: Plan, inner: str) -> str:
        if plan.tp == 1:
            return inner
        words = f"tensor{' and sequence' if plan.sequence_parallel else ''} parallel over {plan.tp} devices"
        return f"{inner}, each {words}" if inner else words

    @staticmethod
    def _heap(plan: Plan) -> Heap:
        return "trimmed" if plan.tp > 1 else "left"
