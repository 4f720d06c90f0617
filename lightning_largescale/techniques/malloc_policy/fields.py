"""Treatment of the CPU's heap, which follows from the fields of all techniques."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_largescale.plan_fields import PlanFields, needed_heaps

Heap = Literal["left", "trimmed", "watched", "mapped"]
_MOST_FIRST: tuple[Heap, ...] = ("mapped", "watched", "trimmed")


@dataclass(frozen=True, kw_only=True)
class MallocPolicyFields(PlanFields):
    """Heap of a run on the CPU."""

    __slots__ = ()

    @property
    def heap(self) -> Heap:
        """Treatment of heap fragmentation on the CPU.

        "left": none; "trimmed": the heap is trimmed between steps; "watched": it is trimmed whenever it outgrows what
        the step needs; "mapped": tensors are allocated outside of it.

        Source: techniques/malloc_policy/heap.py, which gives the reasons.
        """
        needed = needed_heaps(self)
        return next((heap for heap in _MOST_FIRST if heap in needed), "left")
