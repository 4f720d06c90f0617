"""Peak memory of one rank under a plan: a sum of named terms at the worst moment of a training step.

A step is walked through moment by moment (setup, each segment's forward, each segment's backward, the optimizer's
step). What is live at each is a sum of terms; the peak is the largest sum. Terms are small pure functions of the
workload and the plan, so that a new technique adds a term or changes one.

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

# Holes between the tensors of a step, as a share of the bytes that come and go in it (benchmarks/results). On CPU: of
# glibc's heap, by what is done about them (`Plan.heap`). On CUDA: of the caching allocator's segments, not measured
# yet.
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
# Once per process, whatever the model: kernels' code pages and work buffers on first use (cpu); the workspaces that
# cuBLAS has of the allocator, one for each thread that multiplies (cuda), 32 MiB each on Hopper.
RUNTIME_BYTES = {"cpu": 24 * 2**20, "cuda": 64 * 2**20}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """What one rank holds on its device tier at the worst moment: on CPU the process's resident memory; on CUDA what
    torch's allocator has of the device, beside which there is CUDA's context.

    Attributes:
        moment: that moment, in words: `"backward of blocks.11"`.
        terms: bytes by term, largest first; those of 0 bytes are left out.
        elsewhere: bytes kept in other tiers, by tier; those of 0 bytes are left out.
        kind: of the device, "cpu" or "cuda".
    """

    moment: str
    terms: Mapping[str, int] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    kind: str = "cpu"

    @property
    def peak_bytes(self) -> int:
        """The sum of the terms, bytes: what has to fit a budget."""
        return sum(self.terms.values())

    @property
    def measured_bytes(self) -> int:
        """Of the peak, the bytes that `hardware.usage.peak_bytes` counts: on CPU all of them; on CUDA those that the
        allocator gives out, and not the holes between them.
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
    """The worst moment of a step of `workload` under `plan`, on one rank.

    Args:
        workload: the traced step, of one rank's micro-batch.
        plan: the plan to price; need not fit the number of devices of `hardware`.
        hardware: of which only the kind counts.
        baseline_bytes: what the process holds before, without the model (bytes).
        accumulate_grad_batches: micro-batches between optimizer steps; above 1, gradients stay unsharded in between
            unless parameters are offloaded.
        built: the model has its values before setup; without, they are made group by group where it is divided or kept
            in another tier.

    Source: the module's docstring.
    """
    sizes = Sizes(workload, plan, hardware.kind, accumulate_grad_batches)
    return memory_of(sizes, baseline_bytes=baseline_bytes, built=built)


def memory_of(sizes: Sizes, *, baseline_bytes: int = 0, built: bool = True) -> MemoryEstimate:
    """`peak_memory` of the plan that `sizes` are of."""
    worst, worst_index, worst_terms = max(
        _moments(sizes, baseline_bytes, built), key=lambda moment: sum(moment[2].values())
    )
    if worst_index is not None:
        worst = f"{worst} of {_where(sizes.step.segments, worst_index)}"
    shown = sorted(((name, size) for name, size in worst_terms.items() if size), key=lambda item: -item[1])
    return MemoryEstimate(moment=worst, terms=dict(shown), elsewhere=kept_elsewhere(sizes), kind=sizes.kind)


def moments_bytes(sizes: Sizes, *, baseline_bytes: int = 0, built: bool = True) -> list[tuple[int, int]]:
    """Of each moment of a step, the bytes of all terms but the allocator's, and those of them that come and go.

    Amounts that are kept in other tiers change these by sums, each amount by its own.
    """
    return [
        (sum(terms.values()) - terms["allocator"], _moving_bytes(terms))
        for _, _, terms in _moments(sizes, baseline_bytes, built)
    ]


def first_excess(
    sizes: Sizes, budget_bytes: int, recomputed: frozenset[str], *, baseline_bytes: int = 0, built: bool = True
) -> tuple[int, int] | None:
    """Where a step needs more than `budget_bytes`, if it recomputes the blocks in `recomputed`.

    Of those moments the one with the fewest segments before it, as their number, and the bytes above; None where it
    fits.

    Moments that do not lie in a segment (setup, the optimizer's step) have none before them.

    Args:
        sizes: of a plan that recomputes; what they share with those of other blocks is computed once.
        budget_bytes: that one rank may hold.
        recomputed: names of blocks in the place of those that the plan has.
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
    """Bytes lost in holes for each byte that comes and goes in a step.

    Source: measured, benchmarks/results; parallel/heap.py for what is done about it.
    """
    if kind == "cuda":
        return _CUDA_SHARE
    # Trimmed between its steps, tensor parallelism leaves more in each than replicas do.
    return _TENSOR_SHARE if plan.heap == "trimmed" and plan.tp > 1 else _HEAP_SHARES[plan.heap]


def _moving_bytes(terms: Mapping[str, int]) -> int:
    return sum(terms.get(name, 0) for name in _COMES_AND_GOES)


_Moment = tuple[str, int | None, dict[str, int]]


def _moments(sizes: Sizes, baseline_bytes: int, built: bool) -> Iterator[_Moment]:
    """Each moment of one run: what happens, in which segment, and its terms."""
    plan, workload = sizes.plan, sizes.workload
    always = {
        "process before": baseline_bytes,
        "runtime": RUNTIME_BYTES[sizes.kind],
        # Recomputation keeps a copy of a block's until its backward.
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
    # What is released has been stepped on, but for the root's.
    stepped = (None, "") if sizes.plan.release_gradients else sizes.stepped
    ends = {"gradients": _kept_gradients(sizes), "optimizer temporaries": temporaries(sizes, stepped)}
    yield "optimizer step", None, {**states, **ends}


def setup_terms(sizes: Sizes, *, built: bool = True) -> dict[str, int]:
    """Before the first step: the whole model as the user built it, and the first group's shard beside its full copy.

    On CUDA the whole model is in DRAM and only the group that is being sharded is on the device, twice while ranks are
    given the same values; so it is on the CPU where the model has no values yet, once.
    """
    # Tables are divided one after the other, each beside its full copy.
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
    """At each segment, what is on its way between tiers."""
    parameters = parameters_in_flight(sizes, backward=backward)
    activations = activations_in_flight(sizes, backward=backward)
    return [
        {"parameters in flight": one, "activations in flight": other}
        for one, other in zip(parameters, activations, strict=True)
    ]


def live_in_forward(sizes: Sizes, index: int) -> int:
    """Activations and temporaries at the worst moment of one segment's forward, bytes.

    Source: the trace; Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4, for what
        recomputation drops.
    """
    return max(0, sizes.step.segments[index].forward_peak_bytes - sizes.dropped[index])


def live_in_backward(sizes: Sizes, index: int) -> int:
    """Activations and temporaries at the worst moment of one segment's backward, its recomputation included, bytes."""
    segment, dropped = sizes.step.segments[index], sizes.dropped[index]
    live = segment.backward_peak_bytes - dropped
    if sizes.recomputes(segment):
        # What was kept is there already.
        again = max(0, segment.forward_peak_bytes - segment.forward_entry_bytes - sizes.kept(segment))
        live = max(live, segment.backward_entry_bytes - dropped - sizes.saving(segment) + again)
    return max(0, live)


def live_after_backward(sizes: Sizes, index: int) -> int:
    """Activations that are left when one segment's backward is done, bytes."""
    return max(0, sizes.step.segments[index].backward_exit_bytes - sizes.dropped[index])


def forward_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """Gradients and gathered parameters while one segment runs forward.

    Lightning's closure runs the forward before it clears gradients, so those of the step before are still there.

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
    """Gradients and gathered parameters while one segment runs backward, the next group's gather in flight included."""
    terms = {"gradients": _gradients_so_far(sizes, index)}
    block = sizes.step.segments[index].block
    if sizes.plan.release_gradients:
        # A block is stepped on when the first gradient of the next one comes.
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
    """The moment a group's gradients are reduced: autograd's, the flat copy that is sent, and the rank's shard of the
    result.

    The root's own are reduced last, when the whole backward is done.

    On CPU all three are there; on CUDA what was gathered of the group is given back before, and autograd's when they
    have been copied. The holes in a CPU's heap were measured beside that.

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
    """What ranks sent for the last gather of a forward, until its copies for the next one are made.

    On CPU the holes in its heap were measured with it.

    Source: torch.distributed.fsdp, `AllGatherState`.
    """
    if sizes.kind == "cpu" or sizes.plan.dp_shard == 1:
        return 0
    return sizes.gathered(next((block for block in sizes.blocks[index::-1] if block is not None), None))


def _sent(sizes: Sizes, index: int) -> int:
    """What was sent of the gradients of the group that was reduced before, until the next one is.

    On CPU the holes in its heap were measured with it.

    Source: torch.distributed.fsdp, `ReduceScatterState`.
    """
    if sizes.kind == "cpu" or sizes.reductions < sizes.accumulate:
        return 0
    after = _block_beside(sizes, index, 1)
    return 0 if after is None else sizes.gradient(after, whole=True)


def _gathered_ahead(sizes: Sizes, index: int) -> str | None:
    """The block that is gathered while segment `index` runs backward; None where that waits until it is needed.

    Source: torch.distributed.fsdp, which copies on a mesh of one rank when the block is about to run.
    """
    alone = sizes.kind == "cuda" and sizes.plan.dp_shard == 1
    return None if alone else _block_beside(sizes, index, -1)


def _joined(sizes: Sizes) -> int:
    """Parameters, or gradients, of a block that another rank runs, in whose collectives this one takes part."""
    if not sizes.workload.branches or sizes.plan.world_size == sizes.plan.tp:
        return 0
    return max((sizes.gathered(block) for block in sizes.groups if block is not None), default=0)


def _unreduced(sizes: Sizes, index: int) -> int:
    """Whole gradients of the group that runs backward and of the root's, which are reduced when all is done."""
    if sizes.reductions < sizes.accumulate:
        return 0
    return sizes.own_gradient(index) + sizes.root_gradient(index, whole=True)


def _beside_buckets(sizes: Sizes) -> int:
    """Gradients of replicas that no backward has reduced yet, while micro-batches accumulate: they are in no bucket.

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
    """Gradients kept while segment `index` runs backward: later groups', its own, the root's; all when accumulating."""
    after = _block_beside(sizes, index, 1)
    if sizes.accumulate > 1 or (sizes.plan.dp_replicate > 1 and not sizes.gathers):
        return _kept_gradients(sizes) + gradients_passing(sizes, {after})
    if not sizes.gathers:
        later = sizes.kept_from_here[index + 1]
        own = sizes.kept_from_here[index] - later + gradients_passing(sizes, {sizes.blocks[index]} - {after})
        others = later + sizes.root_gradient(index, whole=False) + gradients_passing(sizes, {after})
        return others + min(own, sizes.own_gradient(index))
    # Its own shard of the gradient comes with the reduction, and so does the root's.
    return sizes.kept_from_here[index + 1] + sizes.table_gradients + gradients_passing(sizes, {after})


def _gathered_at(sizes: Sizes, blocks: set[str | None]) -> int:
    """Whole parameters of the root and of `blocks`."""
    return sum(sizes.gathered(name) for name in {None, *blocks})


def _block_beside(sizes: Sizes, index: int, step: int) -> str | None:
    """The block nearest to segment `index` before it (`step` -1) or after it (1); None where there is none."""
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
