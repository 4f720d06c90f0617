"""Workload and its parts: the nouns that the tracer fills and the planner reads. Frozen, and JSON in and out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_largescale.serialize import from_fields
from lightning_largescale.workload.parts.part import Part

if TYPE_CHECKING:
    from torch import nn

_COMMUNICATED = ("forward_reduced", "backward_reduced", "forward_halves", "backward_halves")
# Tensors that an allocator may map afresh each time they are made.
LARGE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of the module; a tied weight is one parameter with several names.

    Attributes:
        name: its first name in `named_parameters`.
        shape: its full shape.
        dtype: of its elements, as torch names it: `"float32"`.
        bytes: of the full parameter.
        trainable: `requires_grad`.
        used: it received a gradient in the trace; False throughout in evaluation.
        block: name of the repeated block whose FSDP group owns it, or of the one of `Workload.wraps`; None for the root
            group.
        aliases: its other names.
        embedding: it is the table of an embedding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    trainable: bool
    used: bool
    block: str | None
    aliases: tuple[str, ...] = ()
    embedding: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One stretch of the step, in executed order: a run of a repeated block, or what lies between two.

    Live bytes are activations and temporaries. Parameters, buffers, the batch and accumulated gradients are left out; a
    gradient counts until it is in `.grad`. The backward of a segment is that of the autograd nodes its forward made.

    Attributes:
        block: name of the block, or of one of `Workload.wraps`; None for what lies between. A block run twice appears
            twice.
        forward_flops: floating-point operations of matrix products and convolutions.
        backward_flops: the same in backward.
        forward_moved_bytes: what the operations read and write.
        backward_moved_bytes: the same in backward.
        forward_large_bytes: of the tensors that operations make, those of `LARGE_BYTES` or more.
        backward_large_bytes: the same in backward.
        input_bytes: activations entering the block that entered none before: what recomputation keeps; 0 for a rest.
        saved_bytes: first saved for backward here; each storage once, parameters, buffers and the batch left out.
        forward_entry_bytes: live when the forward enters.
        forward_peak_bytes: live at the worst moment inside.
        forward_exit_bytes: live when the forward leaves.
        backward_entry_bytes: live when the backward enters.
        backward_peak_bytes: live at the worst moment inside.
        backward_exit_bytes: live when the backward leaves.
        saved_copy_bytes: part of `saved_bytes` that are copies which casts made of the matrices that blocks own; FSDP
            gathers these in the type of compute and makes no copies.
        forward_copy_bytes: what such copies, of all segments, add to `forward_peak_bytes`.
        backward_copy_bytes: what they add to `backward_peak_bytes`.
        moved_copy_bytes: part of `forward_moved_bytes` that those casts read and write.
        product_bytes: results of matrix products, convolutions and attention in the forward.
        moved_product_bytes: part of `forward_moved_bytes` that these read and write.
        backward_gradient_bytes: of the gradients that its backward makes, those that are there at the worst moment of
            it, beside `backward_peak_bytes`, which has gradients until they are made; None where that is not known.
        completed: names of the parameters whose gradient is there when its backward leaves, and not before.
    """

    block: str | None
    forward_flops: int = 0
    backward_flops: int = 0
    forward_moved_bytes: int = 0
    backward_moved_bytes: int = 0
    forward_large_bytes: int = 0
    backward_large_bytes: int = 0
    input_bytes: int = 0
    saved_bytes: int = 0
    forward_entry_bytes: int = 0
    forward_peak_bytes: int = 0
    forward_exit_bytes: int = 0
    backward_entry_bytes: int = 0
    backward_peak_bytes: int = 0
    backward_exit_bytes: int = 0
    saved_copy_bytes: int = 0
    forward_copy_bytes: int = 0
    backward_copy_bytes: int = 0
    moved_copy_bytes: int = 0
    product_bytes: int = 0
    moved_product_bytes: int = 0
    backward_gradient_bytes: int | None = None
    completed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One traced step in one precision.

    Attributes:
        precision: Lightning's name of it, as a Plan has it.
        segments: in executed order.
        largest_temporary_bytes: largest single storage that an operation made and that was not saved for backward.
        loss_peak_bytes: live bytes at the worst moment of what follows the last block (logits, loss), either direction.
        output_bytes: of the tensors that the step returned.
    """

    precision: str
    segments: tuple[Segment, ...]
    largest_temporary_bytes: int = 0
    loss_peak_bytes: int = 0
    output_bytes: int = 0

    @property
    def saved_bytes(self) -> int:
        """Saved for backward by all segments, bytes."""
        return sum(segment.saved_bytes for segment in self.segments)

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the forward."""
        return sum(segment.forward_flops for segment in self.segments)

    @property
    def backward_flops(self) -> int:
        """Floating-point operations of the backward."""
        return sum(segment.backward_flops for segment in self.segments)

    @property
    def peak_bytes(self) -> int:
        """Live bytes at the worst moment of the step."""
        return max((max(s.forward_peak_bytes, s.backward_peak_bytes) for s in self.segments), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerNeeds:
    """What one optimizer of the module keeps, and takes for a while in `step()`.

    Attributes:
        class_name: of the optimizer.
        state_bytes: by name of the parameter it updates, unsharded.
        step_temporary_largest: peak temporaries of `step()` as a multiple of the largest trainable parameter's bytes.
        step_temporary_total: the same as a multiple of all trainable bytes; one of the two is 0.
        moved_bytes: what the operations of one `step()` read and write.
        unpaged_bytes: of `state_bytes`, those of tensors of another shape than the parameter's, as of its rows: pages
            have none of them.
        divisible: a step on some elements of a parameter is that on all of it, as far as they go.
    """

    class_name: str
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    step_temporary_largest: float = 0.0
    step_temporary_total: float = 0.0
    moved_bytes: int = 0
    unpaged_bytes: Mapping[str, int] = field(default_factory=dict)
    divisible: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Divided:
    """How the parameters of a block are divided among the ranks of tensor parallelism.

    Attributes:
        parts: by a parameter's name in the block, how it is divided; others stay whole.
        whole: by its name, why a matrix stays whole.
        saved_share: of what the forward saves for backward, what it saves when divided, on one rank.
        flops_share: of the floating-point operations of its forward, those of one rank.
        forward_reduced: bytes of each tensor that is summed over the ranks in forward.
        backward_reduced: the same in backward.
        forward_halves: bytes of each tensor that is gathered from the ranks in forward, or summed to parts of it.
        backward_halves: the same in backward.
        sequence: what it costs where ranks share the sequence between the matrices; None where they cannot.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    saved_share: float = 1.0
    flops_share: float = 1.0
    forward_reduced: tuple[int, ...] = ()
    backward_reduced: tuple[int, ...] = ()
    forward_halves: tuple[int, ...] = ()
    backward_halves: tuple[int, ...] = ()
    sequence: Divided | None = None

    def scaled(self, share: float) -> Divided:
        """The same for `share` times the samples."""
        scaled: dict[str, Any] = {
            name: tuple(round(size * share) for size in getattr(self, name)) for name in _COMMUNICATED
        }
        sequence = None if self.sequence is None else self.sequence.scaled(share)
        return dataclasses.replace(self, **scaled, sequence=sequence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What one step of a module needs on one device, and what its structure permits.

    Attributes:
        name: of the module's class.
        parameters: each once.
        buffer_bytes: of all buffers.
        optimizers: those of `configure_optimizers`, in its order; empty outside fit.
        steps: by precision.
        batch_samples: samples in the traced batch.
        batch_bytes: of its tensors.
        blocks: names of the repeated blocks.
        wraps: names of modules outside of them that are large and whose parameters nothing else reads in the step.
        divisions: by a number of ranks of tensor parallelism, what these divide of each block, by its name; "" is what
            lies outside of blocks.
        stage: "fit", "validate", "test" or "predict".
        branches: the step reads numbers off tensors, so that ranks may run different modules.
        whole: why parameters can be neither sharded nor offloaded, and what to do; empty where they can.
        approximate: why the numbers are not exact, a sentence each; empty when they are.
    """

    name: str
    parameters: tuple[Parameter, ...]
    buffer_bytes: int
    optimizers: tuple[OptimizerNeeds, ...]
    steps: Mapping[str, Step]
    batch_samples: int
    batch_bytes: int
    blocks: tuple[str, ...]
    wraps: tuple[str, ...] = ()
    divisions: Mapping[int, Mapping[str, Divided]] = field(default_factory=dict)
    stage: str = "fit"
    branches: bool = False
    whole: str = ""
    approximate: tuple[str, ...] = ()

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters, unsharded."""
        return sum(parameter.bytes for parameter in self.parameters)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the parameters that require a gradient, unsharded."""
        return sum(parameter.bytes for parameter in self.parameters if parameter.trainable)

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @classmethod
    def trace(
        cls,
        module: nn.Module,
        batch: Any,
        *,
        step: str = "training_step",
        precisions: Sequence[str] = ("32-true", "bf16-mixed"),
        batch_idx: int = 0,
        device_type: str = "cpu",
        tp_sizes: Sequence[int] = (),
    ) -> Workload:
        """Run one step of `module` on fake tensors and note what it needs; nothing is allocated, the module stays.

        Args:
            module: a LightningModule, or any module: then its forward, the loss being the sum of its floating outputs.
            batch: what the step receives, on the CPU; any nesting of tensors. None: only the parameters are looked at.
            step: "training_step", "validation_step", "test_step", "predict_step", or "forward": forward and backward.
            precisions: to trace, Lightning's names, as a Plan has them; "bf16-true", "16-true" and "64-true" take a
                module that has been converted.
            batch_idx: given to the step.
            device_type: whose kernels and optimizer defaults count: "cpu" or "cuda".
            tp_sizes: numbers of ranks to look for what tensor parallelism may divide among.

        Returns:
            The workload. Where the step cannot run on fakes it is that of a real step on one sample and on two, drawn
            out to the batch; a precision in which it cannot run at all is left out of `steps` where it can in another;
            failing all, an estimate from the parameters. `approximate` says which and why.

        Raises:
            PlanError: `step` or a precision is not of those above, there is no precision, the module is not
                converted to it, or a parameter of a lazy module has no shape yet.
        """
        from lightning_largescale.workload.trace import trace_workload

        return trace_workload(
            module,
            batch,
            step=step,
            precisions=tuple(precisions),
            batch_idx=batch_idx,
            device_type=device_type,
            tp_sizes=tuple(tp_sizes),
        )

    def with_batch(self, samples: int) -> Workload:
        """The same step with `samples` samples: live and saved bytes, FLOPs and the batch grow in proportion."""
        share = samples / max(1, self.batch_samples)
        return dataclasses.replace(
            self,
            steps={name: combine_steps([step], lambda value: value * share) for name, step in self.steps.items()},
            divisions={
                ranks: {block: found.scaled(share) for block, found in blocks.items()}
                for ranks, blocks in self.divisions.items()
            },
            batch_samples=samples,
            batch_bytes=round(self.batch_bytes * share),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and text, for JSON."""
        fields = dataclasses.asdict(self)
        for blocks in fields["divisions"].values():
            for found in blocks.values():
                _forget_origins(found)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Workload:
        """The workload that `to_dict` gave, also after a round trip through JSON.

        Raises:
            PlanError: a field is missing, unknown, or not of the accepted type.
        """
        return from_fields(cls, fields, "workload")


def _forget_origins(found: dict[str, Any]) -> None:
    """Leave out of a division what only a search for it needs, and no JSON has."""
    for part in found["parts"].values():
        del part["origins"]
    if found["sequence"] is not None:
        _forget_origins(found["sequence"])


def only_blocks(step: Step, names: Collection[str]) -> Step:
    """`step` with segments of the blocks in `names` only; what others ran lies between these."""
    segments = (s if s.block in names else dataclasses.replace(s, block=None) for s in step.segments)
    return dataclasses.replace(step, segments=tuple(segments))


def combine_steps(steps: Sequence[Step], rule: Callable[..., float]) -> Step:
    """The step whose every number is `rule` of those numbers of `steps`, rounded, never below 0.

    Args:
        steps: with the same segments.
        rule: takes one number of each step.
    """
    segments = [
        dataclasses.replace(
            alike[0], **_combined(alike, rule, leave_out=("block", "backward_gradient_bytes", "completed"))
        )
        for alike in zip(*(step.segments for step in steps), strict=True)
    ]
    numbers = _combined(steps, rule, leave_out=("precision", "segments"))
    return Step(precision=steps[0].precision, segments=tuple(segments), **numbers)


def _combined(
    rows: Sequence[Segment] | Sequence[Step], rule: Callable[..., float], *, leave_out: tuple[str, ...]
) -> dict[str, int]:
    names = [field.name for field in dataclasses.fields(rows[0]) if field.name not in leave_out]
    return {name: max(0, round(rule(*(getattr(row, name) for row in rows)))) for name in names}
