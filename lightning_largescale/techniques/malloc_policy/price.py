"""Price of the treatment of the heap: fragmentation, and page faults on fresh memory.

Source: measured, benchmarks/results; techniques/malloc_policy/heap.py for how the heap is managed; man page mallopt(3),
    M_MMAP_THRESHOLD.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.price import Price

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.sizes import Sizes

# Fragmentation (holes between the tensors of a step) as a share of the bytes that come and go in it
# (benchmarks/results). On CPU: of glibc's heap, by how it is managed. On CUDA: of the caching allocator's segments, not
# measured yet.
_HEAP_SHARES = {"left": 0.6, "trimmed": 0.15, "watched": 0.15, "mapped": 0.05}
_TENSOR_SHARE, _CUDA_SHARE = 0.45, 0.06
# Share of a step's allocations that is fresh memory, under the plans that manage their heap during the step.
_AFRESH = {"mapped": 1.0, "watched": 0.25}


class MallocPolicyPrice(Price):
    """Heap of a run on the CPU; on CUDA the caching allocator."""

    @override
    def fragmentation(self, plan: Plan, kind: str) -> float:
        if kind == "cuda":
            return _CUDA_SHARE
        # Even if the heap is trimmed between steps, tensor parallelism fragments it more in each step than replicas do.
        tensor = plan.world_size > plan.dp
        return _TENSOR_SHARE if plan.heap == "trimmed" and tensor else _HEAP_SHARES[plan.heap]

    @override
    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        """Return the page faults on a step's fresh memory, under plans that return freed memory to the system.

        Allocations of the optimizer's step are left out.
        """
        if rates.fresh_memory is None or sizes.kind != "cpu" or sizes.plan.heap not in _AFRESH:
            return {}
        each, once = sizes.fresh_bytes
        return {"page faults": _AFRESH[sizes.plan.heap] * (each * sizes.accumulate + once) / rates.fresh_memory}
