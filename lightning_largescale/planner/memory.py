"""Peak memory of one rank under a plan: a sum of named terms at the worst moment of a training step.

A step is walked through moment by moment (setup, each segment's forward, each segment's backward, the optimizer's
step). What is live at each is a sum of terms; the peak is the largest sum. Terms are small pure functions of the
workload and the plan, so that a new technique adds a term or changes one.

Source: Rajbhandari et al. 2020, "ZeRO", section 3 (model states and residual states); the traced live bytes are those
    of `Workload`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import Plan
from lightning_largescale.workload import Parameter, Segment, Step, Workload

# Holes between the tensors of a step, as a share of the bytes that come and go in it (benchmarks/results). On CPU: of
# glibc's heap; where it is trimmed between steps; and under plans that map their tensors instead. On CUDA: of the
# caching allocator's segments, not measured yet.
_HEAP_SHARE, _TRIMMED_SHARE, _MAPPED_SHARE, _CUDA_SHARE = 0.45, 0.15, 0.05, 0.06
_COMES_AND_GOES = (
    "activations",
    "gathered parameters",
    "gradients",
    "unreduced gradients",
    "communication",
    "optimizer temporaries",
)
# Once per process, whatever the model: kernels' code pages and work buffers on first use (cpu); the CUDA context and
# the libraries' workspaces (cuda).
RUNTIME_BYTES = {"cpu": 24 * 2**20, "cuda": 640 * 2**20}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """What one rank holds on its device tier at the worst moment.

    Attributes:
        moment: that moment, in words: `"backward of blocks.11"`.
        terms: bytes by term, largest first; those of 0 bytes are left out.
    """

    moment: str
    terms: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The sum of the terms, bytes."""
        return sum(self.terms.values())


def peak_memory(
    workload: Workload, plan: Plan, hardware: Hardware, *, baseline_bytes: int = 0, accumulate_grad_batches: int = 1
) -> MemoryEstimate:
    """The worst moment of a step of `workload` under `plan`, on one rank.

    Args:
        workload: the traced step, of one rank's micro-batch.
        plan: the plan to price; need not fit the number of devices of `hardware`.
        hardware: of which only the kind counts.
        baseline_bytes: what the process holds before, without the model (bytes).
        accumulate_grad_batches: micro-batches between optimizer steps; above 1, gradients stay unsharded in between.

    Source: the module's docstring.
    """
    sizes = Sizes(workload, plan, hardware.kind, accumulate_grad_batches)
    always = {
        "process before": baseline_bytes,
        "runtime": RUNTIME_BYTES[hardware.kind],
        "buffers": workload.buffer_bytes,
    }
    worst = MemoryEstimate(moment="", terms={})
    for moment, terms in _moments(sizes):
        terms = {**always, **terms}
        moving = sum(terms.get(name, 0) for name in _COMES_AND_GOES)
        terms["allocator"] = int(allocator_share(plan, hardware.kind) * moving)
        if sum(terms.values()) > worst.peak_bytes:
            worst = MemoryEstimate(moment=moment, terms=terms)
    shown = sorted(((name, size) for name, size in worst.terms.items() if size), key=lambda item: -item[1])
    return MemoryEstimate(moment=worst.moment, terms=dict(shown))


def allocator_share(plan: Plan, kind: str) -> float:
    """Bytes lost in holes for each byte that comes and goes in a step.

    Source: measured, benchmarks/results; parallel/heap.py for what plans that save memory do about it.
    """
    if kind == "cuda":
        return _CUDA_SHARE
    if plan.dp_shard > 1 or plan.activation_checkpointing != "none":
        return _MAPPED_SHARE
    return _TRIMMED_SHARE if plan.dp_replicate > 1 else _HEAP_SHARE


def local_bytes(parameter: Parameter, dp_shard: int) -> int:
    """Bytes of the largest shard of `parameter`: rows of its first dimension divided among `dp_shard` ranks, rounded
    up.

    Source: torch.distributed.fsdp.fully_shard, "Shard(0)" with padding to the largest chunk.
    """
    if dp_shard == 1 or not parameter.shape or parameter.shape[0] == 0:
        return parameter.bytes
    rows = parameter.shape[0]
    return math.ceil(rows / dp_shard) * (parameter.bytes // rows)


class Sizes:
    """The sizes that the terms are made of, in bytes on one rank, computed once for a plan."""

    def __init__(self, workload: Workload, plan: Plan, kind: str, accumulate_grad_batches: int = 1) -> None:
        self.workload, self.plan, self.kind = workload, plan, kind
        self.accumulate = accumulate_grad_batches
        self.step: Step = workload.steps[plan.precision]

    @cached_property
    def sharded(self) -> bool:
        """Whether parameters are divided among ranks."""
        return self.plan.dp_shard > 1

    @cached_property
    def full_parameters(self) -> int:
        """All parameters, undivided."""
        return sum(parameter.bytes for parameter in self.workload.parameters)

    @cached_property
    def parameters(self) -> int:
        """What the rank keeps of the parameters between steps."""
        return sum(local_bytes(parameter, self.plan.dp_shard) for parameter in self.workload.parameters)

    @cached_property
    def gradients(self) -> int:
        """All gradients of one optimizer step, as they are kept between backward and the step."""
        return sum(local_bytes(p, self.plan.dp_shard) for p in self._trained) if self._trains else 0

    @cached_property
    def optimizer_state(self) -> int:
        """What the rank keeps of every optimizer's state, divided as the parameters are."""
        total = 0.0
        for needs in self.workload.optimizers:
            for parameter in self.workload.parameters:
                share = local_bytes(parameter, self.plan.dp_shard) / parameter.bytes if parameter.bytes else 1.0
                total += needs.state_bytes.get(parameter.name, 0) * share
        return int(total)

    @cached_property
    def optimizer_temporaries(self) -> int:
        """The most that one optimizer's `step()` allocates for a while."""
        local = [local_bytes(p, self.plan.dp_shard) for p in self._trained]
        return max(
            (
                int(needs.step_temporary_largest * max(local, default=0) + needs.step_temporary_total * sum(local))
                for needs in self.workload.optimizers
            ),
            default=0,
        )

    def gathered(self, block: str | None) -> int:
        """Whole parameters of one group while it computes, padding included; the root group's under None."""
        whole = sum(local_bytes(p, self.plan.dp_shard) * self.plan.dp_shard for p in self._group(block))
        return whole // 2 if self._mixed and block is not None else whole

    def gradient(self, block: str | None, *, whole: bool) -> int:
        """Gradients of one group: unsharded as autograd makes them, or the rank's shard."""
        group = [parameter for parameter in self._group(block) if parameter.trainable and parameter.used]
        return sum(p.bytes if whole else local_bytes(p, self.plan.dp_shard) for p in group)

    @cached_property
    def _trains(self) -> bool:
        return self.workload.stage == "fit"

    @cached_property
    def _mixed(self) -> bool:
        return self.sharded and self.plan.precision == "bf16-mixed"

    @cached_property
    def _trained(self) -> list[Parameter]:
        return [p for p in self.workload.parameters if p.trainable and p.used]

    @cached_property
    def _groups(self) -> dict[str | None, list[Parameter]]:
        groups: dict[str | None, list[Parameter]] = {}
        for parameter in self.workload.parameters:
            # Under bf16-mixed blocks gather matrices in half the bytes; vectors go with the root, in fp32.
            block = parameter.block if len(parameter.shape) > 1 or not self._mixed else None
            groups.setdefault(block, []).append(parameter)
        return groups

    def _group(self, block: str | None) -> list[Parameter]:
        return self._groups.get(block, [])


def _moments(sizes: Sizes) -> Iterator[tuple[str, dict[str, int]]]:
    """Each moment of one run with its terms, but for those that never change."""
    yield "setup", setup_terms(sizes)
    segments = sizes.step.segments
    for index in range(len(segments)):
        live = live_in_forward(sizes.plan, segments, index)
        yield (
            f"forward of {_where(segments, index)}",
            {**_states(sizes), **forward_terms(sizes, index), "activations": live},
        )
    if sizes.workload.stage != "fit":
        return
    for index in range(len(segments) - 1, -1, -1):
        live = live_in_backward(sizes.plan, segments, index)
        yield (
            f"backward of {_where(segments, index)}",
            {**_states(sizes), **backward_terms(sizes, index), "activations": live},
        )
        if sizes.sharded:
            exit_live = live_after_backward(sizes.plan, segments, index)
            yield (
                f"gradient reduction of {_where(segments, index)}",
                {**_states(sizes), **reduction_terms(sizes, index), "activations": exit_live},
            )
    yield (
        "optimizer step",
        {**_states(sizes), "gradients": _kept_gradients(sizes), "optimizer temporaries": sizes.optimizer_temporaries},
    )


def setup_terms(sizes: Sizes) -> dict[str, int]:
    """Before the first step: the whole model as the user built it, and the first group's shard beside its full copy.

    On CUDA the whole model is in DRAM and only the group that is being sharded is on the device.
    """
    if not sizes.sharded:
        return {"parameters": sizes.full_parameters}
    largest = max((sizes.gathered(block) for block in sizes._groups), default=0)
    if sizes.kind == "cpu":
        return {"parameters": sizes.full_parameters, "gathered parameters": largest // sizes.plan.dp_shard}
    return {"parameters": sizes.parameters, "gathered parameters": largest}


def live_in_forward(plan: Plan, segments: tuple[Segment, ...], index: int) -> int:
    """Activations and temporaries at the worst moment of one segment's forward, bytes.

    Source: the trace; Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4, for what
        recomputation drops.
    """
    return max(0, segments[index].forward_peak_bytes - _dropped(plan, segments[:index]))


def live_in_backward(plan: Plan, segments: tuple[Segment, ...], index: int) -> int:
    """Activations and temporaries at the worst moment of one segment's backward, its recomputation included, bytes."""
    segment, dropped = segments[index], _dropped(plan, segments[:index])
    live = segment.backward_peak_bytes - dropped
    if _recomputed(plan, segment):
        again = segment.forward_peak_bytes - segment.forward_entry_bytes
        live = max(live, segment.backward_entry_bytes - dropped - _saving(segment) + again)
    return max(0, live)


def live_after_backward(plan: Plan, segments: tuple[Segment, ...], index: int) -> int:
    """Activations that are left when one segment's backward is done, bytes."""
    return max(0, segments[index].backward_exit_bytes - _dropped(plan, segments[:index]))


def forward_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """Gradients and gathered parameters while one segment runs forward.

    Lightning's closure runs the forward before it clears gradients, so those of the step before are still there.

    Source: lightning.pytorch.loops.optimization.automatic, `Closure.closure`; torch.distributed.fsdp.fully_shard.
    """
    terms = {"gradients": _kept_gradients(sizes)}
    if sizes.sharded:
        block = sizes.step.segments[index].block
        gathered = {None, block}
        if not sizes.plan.reshard_after_forward:
            gathered |= {segment.block for segment in sizes.step.segments[:index]}
        terms["gathered parameters"] = sum(sizes.gathered(name) for name in gathered)
    return terms


def backward_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """Gradients and gathered parameters while one segment runs backward, the next group's gather in flight included."""
    segments = sizes.step.segments
    block = segments[index].block
    waiting = _blocks_before(segments, index, block)
    gradients = _gradients_so_far(sizes, index)
    if not sizes.sharded:
        return {"gradients": gradients}
    gathered: set[str | None] = {None, block}
    gathered |= set(waiting[:1]) if sizes.plan.reshard_after_forward else set(waiting)
    return {
        "gradients": gradients,
        "unreduced gradients": _unreduced(sizes, block),
        "gathered parameters": sum(sizes.gathered(name) for name in gathered),
    }


def reduction_terms(sizes: Sizes, index: int) -> dict[str, int]:
    """The moment a group's gradients are reduced: autograd's, the flat copy that is sent, and the rank's shard of the
    result.

    The root's own are reduced last, when the whole backward is done.

    Source: torch.distributed.fsdp, `foreach_reduce`: input, output and unsharded gradients live together.
    """
    block = sizes.step.segments[index].block
    if block is None and index > 0:
        return {}
    sent = sizes.gradient(block, whole=True) + sizes.gradient(block, whole=False)
    return {**backward_terms(sizes, index), "communication": sent}


def _states(sizes: Sizes) -> dict[str, int]:
    return {
        "parameters": sizes.parameters,
        "optimizer state": sizes.optimizer_state if sizes.workload.stage == "fit" else 0,
        "batch": sizes.workload.batch_bytes,
    }


def _unreduced(sizes: Sizes, block: str | None) -> int:
    """Whole gradients of the group that runs backward and of the root's, which are reduced when all is done."""
    if sizes.accumulate > 1:
        return 0
    return sum(sizes.gradient(name, whole=True) for name in {None, block})


def _kept_gradients(sizes: Sizes) -> int:
    if sizes.sharded and sizes.accumulate > 1:
        return sum(p.bytes for p in sizes._trained) if sizes.workload.stage == "fit" else 0
    return sizes.gradients


def _gradients_so_far(sizes: Sizes, index: int) -> int:
    """Gradients kept while segment `index` runs backward: later groups', its own, the root's; all when accumulating."""
    if sizes.accumulate > 1 or (sizes.plan.dp_replicate > 1 and not sizes.sharded):
        return _kept_gradients(sizes)
    segments = sizes.step.segments
    done: set[str | None] = {segment.block for segment in segments[index + 1 :] if segment.block is not None}
    if not sizes.sharded:
        done |= {segments[index].block, None}
    return sum(sizes.gradient(name, whole=False) for name in done)


def _blocks_before(segments: tuple[Segment, ...], index: int, block: str | None) -> list[str]:
    """Blocks whose backward is still to come after segment `index`, nearest first."""
    found: list[str] = []
    for segment in reversed(segments[:index]):
        if segment.block is not None and segment.block != block and segment.block not in found:
            found.append(segment.block)
    return found


def _recomputed(plan: Plan, segment: Segment) -> bool:
    return plan.activation_checkpointing == "full" and segment.block is not None


def _saving(segment: Segment) -> int:
    return max(0, segment.saved_bytes - segment.input_bytes)


def _dropped(plan: Plan, segments: tuple[Segment, ...]) -> int:
    return sum(_saving(segment) for segment in segments if _recomputed(plan, segment))


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
