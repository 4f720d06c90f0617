"""Peak memory of one rank under a plan: a sum of named terms at the worst moment of a training step.

A step is a sequence of moments: setup, each segment's forward, each segment's backward, the optimizer's step. The live
bytes at each moment are a sum of terms; the peak is the largest sum. The terms here are those of any run; techniques
add theirs (`Price.memory`).

Source: Rajbhandari et al. 2020, "ZeRO", section 3 (model states and residual states); the traced live bytes are those
    of `Workload`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_largescale.planner.placement import kept_elsewhere
from lightning_largescale.planner.price import Moment, Terms
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.prices import PRICES

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Segment, Workload

_PASSING_TERMS = {"activations", "gradients"}.union(*(price.passing_terms for price in PRICES))
# Bytes per process, whatever the model: kernels' code pages and work buffers on first use (cpu); the workspaces that
# cuBLAS takes from the allocator (cuda), one for each thread that multiplies, 32 MiB each on Hopper.
RUNTIME_BYTES = {"cpu": 24 * 2**20, "cuda": 64 * 2**20}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Peak memory of one rank on its device tier.

    On CPU it is the process's resident memory; on CUDA what torch's allocator reserves, without CUDA's context.

    Attributes:
        moment: the moment of the peak, in words: `"backward of blocks.11"`.
        terms: bytes by term, largest first; terms of 0 bytes are left out.
        elsewhere: bytes kept in other tiers, by tier; tiers of 0 bytes are left out.
        kind: the kind of device, "cpu" or "cuda".
    """

    moment: str
    terms: Mapping[str, int] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    kind: str = "cpu"

    @property
    def peak_bytes(self) -> int:
        """The sum of the terms (bytes), which has to fit a budget."""
        return sum(self.terms.values())

    @property
    def measured_bytes(self) -> int:
        """The bytes of the peak that `hardware.usage.peak_bytes` counts.

        On CPU all of them; on CUDA those that are allocated, without the allocator's fragmentation.
        """
        return self.peak_bytes - (self.terms.get("allocator", 0) if self.kind == "cuda" else 0)


def peak_memory(
    workload: Workload,
    plan: Plan,
    hardware: Hardware,
    *,
    baseline_bytes: int = 0,
    accumulate_grad_batches: int = 1,
    built: bool = True,
) -> MemoryEstimate:
    """Return the peak memory of one rank in a step of `workload` under `plan`.

    Args:
        workload: the traced step, of one rank's micro-batch.
        plan: the plan to price; it need not fit the number of devices of `hardware`.
        hardware: the hardware; only its kind counts.
        baseline_bytes: bytes that the process holds before, without the model.
        accumulate_grad_batches: micro-batches between optimizer steps; above 1, gradients stay unsharded in between
            unless parameters are offloaded.
        built: whether the model is materialized before setup; if not, a model that is sharded or offloaded is
            materialized group by group.

    Source: the module's docstring.
    """
    sizes = Sizes(workload, plan, hardware.kind, accumulate_grad_batches)
    return memory_of(sizes, baseline_bytes=baseline_bytes, built=built)


def memory_of(sizes: Sizes, *, baseline_bytes: int = 0, built: bool = True) -> MemoryEstimate:
    """Return `peak_memory` of the plan of `sizes`."""
    worst, worst_index, worst_terms = max(
        _moments(sizes, baseline_bytes, built), key=lambda moment: sum(moment[2].values())
    )
    if worst_index is not None:
        worst = f"{worst} of {_where(sizes.step.segments, worst_index)}"
    shown = sorted(((name, size) for name, size in worst_terms.items() if size), key=lambda item: -item[1])
    return MemoryEstimate(moment=worst, terms=dict(shown), elsewhere=kept_elsewhere(sizes), kind=sizes.kind)


def moments_bytes(sizes: Sizes, *, baseline_bytes: int = 0, built: bool = True) -> list[tuple[int, int]]:
    """Return, for each moment of a step, the bytes of all terms except the allocator's, and of those that come and go.

    Every amount of offload adds its own change to these, independently of the others.
    """
    return [
        (sum(terms.values()) - terms["allocator"], _passing_bytes(terms))
        for _, _, terms in _moments(sizes, baseline_bytes, built)
    ]


def first_excess(
    sizes: Sizes, budget_bytes: int, recomputed: frozenset[str], *, baseline_bytes: int = 0, built: bool = True
) -> tuple[int, int] | None:
    """Return the first moment at which a step that recomputes the blocks in `recomputed` exceeds `budget_bytes`.

    It is the moment with the fewest segments before it, as (that number, bytes above the budget); None if the step
    fits.

    Moments outside of segments (setup, the optimizer's step) have no segments before them.

    Args:
        sizes: the sizes of a plan that recomputes; what does not depend on the blocks is computed once.
        budget_bytes: bytes that one rank may hold.
        recomputed: names of the blocks to recompute, instead of the plan's.
        baseline_bytes: as for `peak_memory`.
        built: as for `peak_memory`.
    """
    moments = (
        (index or 0, sum(terms.values()))
        for _, index, terms in _moments(sizes.recomputing(recomputed), baseline_bytes, built)
    )
    above = [(index, total - budget_bytes) for index, total in moments if total > budget_bytes]
    return min(above, key=lambda moment: (moment[0], -moment[1]), default=None)


def allocator_share(plan: Plan, kind: str) -> float:
    """Return the bytes lost to fragmentation for each byte that comes and goes in a step."""
    return sum(price.fragmentation(plan, kind) for price in PRICES)


def _passing_bytes(terms: Mapping[str, int]) -> int:
    return sum(size for name, size in terms.items() if name in _PASSING_TERMS)


def _moments(sizes: Sizes, baseline_bytes: int, built: bool) -> Iterator[tuple[str, int | None, dict[str, int]]]:
    """Yield each moment of one run: its name, the index of its segment, and its terms."""
    share = allocator_share(sizes.plan, sizes.kind)
    for moment, index, terms in _without_allocator(sizes, baseline_bytes, built):
        terms["allocator"] = int(share * _passing_bytes(terms))
        yield moment, index, terms


def _without_allocator(
    sizes: Sizes, baseline_bytes: int, built: bool
) -> Iterator[tuple[str, int | None, dict[str, int]]]:
    def at(moment: Moment, index: int = 0) -> dict[str, int]:
        """Return the sums of the terms of all at one moment."""
        if moment not in found:
            process = {"process before": baseline_bytes, "runtime": RUNTIME_BYTES[sizes.kind]}
            of_techniques = [price.memory(sizes, moment, built=built) for price in reversed(PRICES)]
            found[moment] = [process, _of_any_run(sizes, moment), *filter(None, of_techniques)]
        terms: dict[str, int] = {}
        for added in found[moment]:
            for name, size in added.items():
                terms[name] = terms.get(name, 0) + (size if isinstance(size, int) else size[index])
        return terms

    found: dict[Moment, list[Terms]] = {}
    blocks = sizes.blocks
    yield "setup", None, at("setup")
    for index in range(len(blocks)):
        yield "forward", index, at("forward", index)
    if sizes.workload.stage != "fit":
        return
    for index in range(len(blocks) - 1, -1, -1):
        yield "backward", index, at("backward", index)
        # The root's gradients are reduced last, after the whole backward.
        if sizes.gathers and (blocks[index] is not None or index == 0):
            yield "gradient reduction", index, at("gradient reduction", index)
    yield "optimizer step", None, at("optimizer step")


def _of_any_run(sizes: Sizes, moment: Moment) -> Terms:
    """Return the terms of a moment that any run has.

    Lightning's closure runs the forward before it clears gradients, so those of the previous step are still live.

    Source: lightning.pytorch.loops.optimization.automatic, `Closure.closure`; for activations the trace.
    """
    buffers = {"buffers": sizes.workload.buffer_bytes}
    if moment == "setup":
        return buffers if sizes.gathers else {**buffers, "parameters": sizes.full_parameters}
    terms: dict[str, int | Sequence[int]] = {
        **buffers,
        "parameters": sizes.parameters_here,
        "optimizer state": sizes.state_here,
        "batch": sizes.workload.batch_bytes,
        "gradients": _kept_gradients(sizes),
    }
    if moment == "optimizer step":
        return terms
    segments, dropped = sizes.step.segments, sizes.dropped
    if moment == "forward":
        live = [max(0, one.forward_peak_bytes - gone) for one, gone in zip(segments, dropped, strict=True)]
        return {**terms, "activations": live}
    terms["gradients"] = [_gradients_so_far(sizes, index) for index in range(len(segments))]
    if moment == "backward":
        return {**terms, "activations": [sizes.live_in_backward(index) for index in range(len(segments))]}
    live = [max(0, one.backward_exit_bytes - gone) for one, gone in zip(segments, dropped, strict=True)]
    return {**terms, "activations": live}


def _kept_gradients(sizes: Sizes) -> int:
    if sizes.workload.stage != "fit":
        return 0
    if sizes.gathers and sizes.reductions < sizes.accumulate:
        dense = (one for one in sizes.trained if one.name not in sizes.ungrouped)
        return sum(one.bytes for one in dense) + sizes.ungrouped_gradients
    return sizes.gradients - sizes.passing_gradients


def _gradients_so_far(sizes: Sizes, index: int) -> int:
    """Return the bytes of gradients kept during the backward of segment `index`.

    They are those of later groups, its own and the root's; if micro-batches accumulate, all gradients.
    """
    after = sizes.block_beside(index, 1)
    passing = sizes.gradients_passing({after})
    if sizes.accumulate > 1 or sizes.in_buckets:
        return _kept_gradients(sizes) + passing
    later = sizes.kept_from_here[index + 1]
    if sizes.gathers:
        # The group's own gradient shard arrives with the reduction, and so does the root's.
        return later + sizes.ungrouped_gradients + passing
    own = sizes.kept_from_here[index] - later + sizes.gradients_passing({sizes.blocks[index]} - {after})
    return later + sizes.root_gradient(index, whole=False) + passing + min(own, sizes.own_gradient(index))


def _where(segments: tuple[Segment, ...], index: int) -> str:
    segment = segments[index]
    if segment.block is not None:
        return segment.block
    named = [(i, s.block) for i, s in enumerate(segments) if s.block is not None]
    if not named:
        return "the model"
    if index < named[0][0]:
        return f"what precedes {named[0][1]}"
    before = [name for i, name in named if i < index]
    return f"what follows {before[-1]}"
