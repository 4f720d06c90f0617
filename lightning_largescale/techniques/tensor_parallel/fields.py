"""Fields of tensor parallelism.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (tensor parallelism); Korthikanti et al. 2022, "Reducing
    Activation Recomputation in Large Transformer Models", section 4.2.2 (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_largescale.plan_fields import PlanFields, check_count, check_flag


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
    _heap = "trimmed"
    tp: int = 1
    sequence_parallel: bool = False

    def _in_use(self) -> bool:
        return self.tp > 1

    def _check_values(self) -> Mapping[str, object]:
        check_count(self, "tp", "devices")
        check_flag(self, "sequence_parallel")
        return {}

    def _layout_words(self, inner: str) -> str:
        if self.tp == 1:
            return inner
        words = f"tensor{' and sequence' if self.sequence_parallel else ''} parallel over {self.tp} devices"
        return f"{inner}, each {words}" if inner else words
