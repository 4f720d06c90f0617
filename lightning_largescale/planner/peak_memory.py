"""Peak memory of one rank under a plan: a sum of named terms at the worst moment of a training step.

A step is a sequence of moments: setup, each segment's forward, each segment's backward, the optimizer's step. The live
bytes at each moment are a sum of terms; the peak is the largest sum. Terms are small pure functions of the workload and
the plan, so that a new technique adds a term or changes one.

Source: Rajbhandari et al. 2020, "ZeRO", section 3 (model states and residual states); the traced live bytes are those
    of `Workload`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import Plan
from lightning_largescale.planner.hierarchy import (
    activations_in_flight,
    gradients_passing,
    kept_elsewhere,
    page_buffers,
    parameters_here,
    parameters_in_flight,
    state_here,
    temporaries,
)
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.workload import Segment, Workload

# Fragmentation (holes between the tensors of a step) as a share of the bytes that come and go in it
# (benchmarks/results). On CPU: of glibc's heap, by how it is managed (`Plan.heap`). On CUDA: of the caching allocator's
# segments, not measured yet.
_HEAP_SHARES = {"left": 0.6, "trimmed": 0.15, "watched": 0.15, "mapped": 0.05}
_TENSOR_SHARE, _CUDA_SHARE = 0.45, 0.06
_COMES_AND_GOES = (
    "activations",
    "activations in flight",
    "gathered parameters",
    "gradients",
    "unreduced gradients",
    "communication",
    "optimizer temporaries",
)
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
        (sum(terms.values()) - terms["allocator"], _moving_bytes(terms))
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
    """Return the bytes lost to fragmentation for each byte that comes and goes in a step.

    Source: measured, benchmarks/results; techniques/malloc_policy/heap.py for how the heap is managed.
    """
    if kind == "cuda":
        return _CUDA_SHARE
    # Even if the heap is trimmed between steps, tensor parallelism fragments it more in each step than replicas do.
    return _TENSOR_SHARE if plan.heap == "trimmed" and plan.tp > 1 else _HEAP_SHARES[plan.heap]


def _moving_bytes(terms: Mapping[str, int]) -> int:
    return sum(terms.get(name, 0) for name in _COMES_AND_GOES)


_Moment = tuple[str, int | None, dict[str, int]]


def _moments(sizes: Sizes, baseline_bytes: int, built: bool) -> Iterator[_Moment]:
    """Yield each moment of one run: its name, the index of its segment, and its terms."""
    plan, workload = sizes.plan, sizes.workload
    always = {
        "process before": baseline_bytes,
        "runtime": RUNTIME_BYTES[sizes.kind],
        # Recomputation keeps a copy of a block's buffers until its backward.
        "buffers": workload.buffer_bytes * (1 if plan.activation_checkpointing == "none" else 2),
    }
    share = allocator_share(plan, sizes.kind)
    for moment, index, changing in _changing(sizes, built):
        terms = {**always, **changing}
        terms["allocator"] = int(share * _moving_bytes(terms))
        yield moment, index, terms


def _changing(sizes: Sizes, built: bool) -> Iterator[_Moment]:
    yield "setup", None, setup_terms(sizes, built=built)
    states, segments = _states(sizes), sizes.step.segments
    flights = _in_flight(sizes, backward=False)
    for index in range(len(segments)):
        live = live_in_forward(sizes, index)
        yield "forward", index, {**states, **forward_terms(sizes, index), **flights[index], "activations": live}
    if sizes.workload.stage != "fit":
        return
    flights = _in_flight(sizes, backward=True)
    for index in range(len(segments) - 1, -1, -1):
        live = live_in_backward(sizes, index)
        moved = {**states, **flights[index]}
        yield "backward", index, {**moved, **backward_terms(sizes, index), "activations": live}
        if sizes.gathers:
            live = live_after_backward(sizes, index)
            yield "gradient reduction", index, {**moved, **reduction_terms(sizes, index), "activations": live}
    # Released gradients have been stepped on already, except the root's.
    stepped = (None, "") if sizes.plan.release_gradients else sizes.stepped
    ends = {"gradients": _kept_gradients(sizes), "optimizer temporaries": temporaries(sizes, stepped)}
    yield "optimizer step", None, {**states, **ends}


def setup_terms(sizes: Sizes, *, built: bool = True) -> dict[str, int]:
    """Return the terms at setup: the full model as the user built it, and a group's shard beside its full copy.

    On CUDA the full model is in DRAM, and only the group that is being sharded is on the device, twice while rank 0's
    values are broadcast. The same holds on the CPU for a model that is not materialized yet, but once.
    """
    # Tables are sharded one after the other, each beside its full copy.
    rows = max(map(sizes.local, sizes.tables), default=0)
    if not sizes.gathers:
        return {"parameters": sizes.full_parameters, "rows of a table": rows}
    largest = max((sizes.gathered(block) for block in sizes.groups), default=0)
    if sizes.kind == "cpu" and built:
        gathered = max(largest // sizes.plan.dp_shard, rows)
        return {"parameters": sizes.full_parameters, "gathered parameters": gathered}
    copies = 1 if sizes.kind == "cpu" else 2
    return {"parameters": parameters_here(sizes), "gathered parameters": max(copies * largest, 0 if built else rows)}


def _in_flight(sizes: Sizes, *, backward: bool) -> list[dict[str, int]]:
    """Return, for each segment, the terms in flight between tiers."""
    parameters = parameters_in_flight(sizes, backward=backward)
    activations = activations_in_flight(sizes, backward=backward)
    return [
        {"parameters in flight": one, "activations in flight": other}
        for one, other in zip(parameters, activations, strict=True)
    ]


def live_in_forward(sizes: Sizes, index: int) -> int:
    """Return the bytes of activations and temporaries at the peak of one segment's forward.

    Source: the trace; Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4, for what
        recomputation drops.
    """
    return max(0, sizes.step.segments[index].forward_peak_bytes - sizes.dropped[index])


def live_in_backward(sizes: Sizes, index: int) -> int:
    """Return the bytes of activations and temporaries at the peak of one segment's backward, recomputation included."""
    segment, dropped = sizes.step.segments[index], sizes.dropped[index]
    live = segment.backward_peak_bytes - dropped
    if sizes.recomputes(segment):
        # The kept results are live already.
        again = max(0, segment.forward_peak_bytes - segment.forward_entry_bytes - sizes.kept(segment))
        live = max(live, segment.backward_entry_bytes - dropped - sizes.saving(segment) + again)
    return max(0, live)


def live_after_backward(sizes: Sizes, index: int) -> int:
    """Return the bytes of activations that remain when one segment's backward is done."""
    return max(0, sizes.step.segments[index].backward_exit_bytes - sizes.dropped[index])


def forward_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """Return the terms of gradients and gathered parameters during one segment's forward.

    Lightning's closure runs the forward before it clears gradients, so those of the previous step are still live.

    Source: lightning.pytorch.loops.optimization.automatic, `Closure.closure`; torch.distributed.fsdp.fully_shard.
    """
    terms = {"gradients": _kept_gradients(sizes), "unreduced gradients": _beside_buckets(sizes)}
    if sizes.gathers:
        terms["gathered parameters"] = (
            (
                _gathered_at(sizes, {sizes.step.segments[index].block})
                if sizes.plan.reshard_after_forward
                else sizes.gathered_so_far[index]
            )
            + _received(sizes, index)
            + _joined(sizes)
        )
    return terms


def backward_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """Return the terms of gradients and gathered parameters during one segment's backward.

    The all-gather of the next group, in flight, is included.
    """
    terms = {"gradients": _gradients_so_far(sizes, index)}
    block = sizes.step.segments[index].block
    if sizes.plan.release_gradients:
        # A block is stepped on when the first gradient of the next block arrives.
        ends = (block,) if sizes.kind == "cpu" else ()
        stepped = [name for name in (*ends, _block_beside(sizes, index, 1)) if name is not None]
        terms["optimizer temporaries"] = max((temporaries(sizes, [name]) for name in stepped), default=0)
    if not sizes.gathers:
        return {**terms, "unreduced gradients": _beside_buckets(sizes)}
    terms["unreduced gradients"] = _unreduced(sizes, index) + _joined(sizes)
    terms["communication"] = _sent(sizes, index)
    terms["gathered parameters"] = (
        _gathered_at(sizes, {block, _gathered_ahead(sizes, index)})
        if sizes.plan.reshard_after_forward
        else sizes.gathered_so_far[index]
    ) + _joined(sizes)
    return terms


def reduction_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """Return the terms while a group's gradients are reduced: unsharded gradients, flat send copy, reduced shard.

    The root's gradients are reduced last, after the whole backward.

    On CPU all three are live. On CUDA the group's gathered parameters are freed before, and the unsharded gradients
    once they are copied. The fragmentation of a CPU's heap was measured with these terms.

    Source: torch.distributed.fsdp, `foreach_reduce`.
    """
    block, terms = sizes.blocks[index], backward_terms(sizes, index)
    if block is None and index > 0:
        return {}
    whole = sizes.gradient(block, whole=True)
    if sizes.kind == "cpu":
        return {**terms, "communication": whole + sizes.gradient(block, whole=False)}
    if block is not None:
        terms["gathered parameters"] -= sizes.gathered(block)
        if sizes.reductions == sizes.accumulate:
            terms["unreduced gradients"] += whole - sizes.own_gradient(index)
    return {**terms, "communication": whole}


def _states(sizes: Sizes) -> dict[str, int]:
    return {
        "parameters": parameters_here(sizes),
        "optimizer state": state_here(sizes),
        "page buffers": page_buffers(sizes),
        "batch": sizes.workload.batch_bytes,
    }


def _received(sizes: Sizes, index: int) -> int:
    """Return the bytes of the last all-gather's output in forward, live until the copy-out for the next one.

    On CPU it is part of the measured fragmentation of the heap.

    Source: torch.distributed.fsdp, `AllGatherState`.
    """
    if sizes.kind == "cpu" or sizes.plan.dp_shard == 1:
        return 0
    return sizes.gathered(next((block for block in sizes.blocks[index::-1] if block is not None), None))


def _sent(sizes: Sizes, index: int) -> int:
    """Return the bytes of the previous group's reduce-scatter input, live until the next group is reduced.

    On CPU it is part of the measured fragmentation of the heap.

    Source: torch.distributed.fsdp, `ReduceScatterState`.
    """
    if sizes.kind == "cpu" or sizes.reductions < sizes.accumulate:
        return 0
    after = _block_beside(sizes, index, 1)
    return 0 if after is None else sizes.gradient(after, whole=True)


def _gathered_ahead(sizes: Sizes, index: int) -> str | None:
    """Return the block that is prefetched during the backward of segment `index`; None if it is not prefetched.

    Source: torch.distributed.fsdp, which copies on a mesh of one rank when the block is about to run.
    """
    alone = sizes.kind == "cuda" and sizes.plan.dp_shard == 1
    return None if alone else _block_beside(sizes, index, -1)


def _joined(sizes: Sizes) -> int:
    """Return the parameter bytes, or gradient bytes, of a block whose collectives this rank joins without running it.

    Only models with branches have such blocks, as ranks may run different ones.
    """
    if not sizes.workload.branches or sizes.plan.world_size == sizes.plan.tp:
        return 0
    return max((sizes.gathered(block) for block in sizes.groups if block is not None), default=0)


def _unreduced(sizes: Sizes, index: int) -> int:
    """Return the unsharded gradient bytes of the group that runs backward and of the root, which is reduced last."""
    if sizes.reductions < sizes.accumulate:
        return 0
    return sizes.own_gradient(index) + sizes.root_gradient(index, whole=True)


def _beside_buckets(sizes: Sizes) -> int:
    """Return the bytes of gradients outside of buckets: those of replicas that accumulate, before any reduction.

    Source: torch.nn.parallel.DistributedDataParallel, `no_sync` and `gradient_as_bucket_view`.
    """
    if sizes.gathers or sizes.accumulate == 1 or sizes.plan.dp_replicate == 1 or sizes.workload.stage != "fit":
        return 0
    return sum(parameter.bytes for parameter in sizes.trained if parameter not in sizes.tables)


def _kept_gradients(sizes: Sizes) -> int:
    if sizes.workload.stage != "fit":
        return 0
    if sizes.gathers and sizes.reductions < sizes.accumulate:
        dense = (p for p in sizes.trained if p not in sizes.tables)
        return sum(p.bytes for p in dense) + sizes.table_gradients
    return sizes.gradients - sizes.passing_gradients


def _gradients_so_far(sizes: Sizes, index: int) -> int:
    """Return the bytes of gradients kept during the backward of segment `index`.

    They are those of later groups, its own and the root's; if micro-batches accumulate, all gradients.
    """
    after = _block_beside(sizes, index, 1)
    if sizes.accumulate > 1 or (sizes.plan.dp_replicate > 1 and not sizes.gathers):
        return _kept_gradients(sizes) + gradients_passing(sizes, {after})
    if not sizes.gathers:
        later = sizes.kept_from_here[index + 1]
        own = sizes.kept_from_here[index] - later + gradients_passing(sizes, {sizes.blocks[index]} - {after})
        others = later + sizes.root_gradient(index, whole=False) + gradients_passing(sizes, {after})
        return others + min(own, sizes.own_gradient(index))
    # The group's own gradient shard arrives with the reduction, and so does the root's.
    return sizes.kept_from_here[index + 1] + sizes.table_gradients + gradients_passing(sizes, {after})


def _gathered_at(sizes: Sizes, blocks: set[str | None]) -> int:
    """Return the bytes of unsharded parameters of the root and of `blocks`."""
    return sum(sizes.gathered(name) for name in {None, *blocks})


def _block_beside(sizes: Sizes, index: int, step: int) -> str | None:
    """Return the nearest other block before segment `index` (`step` -1) or after it (1); None if there is none."""
    own, index = sizes.blocks[index], index + step
    while 0 <= index < len(sizes.blocks):
        if sizes.blocks[index] not in (None, own):
            return sizes.blocks[index]
        index += step
    return None


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
