"""Treatment of the CPU's heap, which follows from the fields of all techniques."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_largescale.techniques.plan_fields import Heap, PlanFields, techniques_of

_LEAST_FIRST: tuple[Heap, ...] = ("left", "trimmed", "watched", "mapped")


@dataclass(frozen=True, kw_only=True)
class MallocPolicyFields(PlanFields):
    """Heap of a run on the CPU."""

    __slots__ = ()

    @property
    def heap(self) -> Heap:
        """Treatment of heap fragmentation on the CPU.

        "left": none; "trimmed": the heap is trimmed between steps; "watched": it is trimmed whenever it outgrows what
        the step needs; "mapped": tensors are allocated outside of it.

        Source: parallel/heap.py, which gives the reasons.
        """
        return max((fields._heap(self) for fields in techniques_of(type(self))), key=_LEAST_FIRST.index)  # type: ignore[arg-type]
