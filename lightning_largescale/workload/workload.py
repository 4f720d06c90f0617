"""Workload and its parts: the frozen data classes that the tracer fills and the planner reads, with JSON support."""

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
# From this size on, an allocator may map memory afresh each time a tensor is made.
LARGE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of the module; a tied weight is one parameter with several names.

    Attributes:
        name: its first name in `named_parameters`.
        shape: its full shape.
        dtype: dtype of its elements, as torch names it: `"float32"`.
        bytes: bytes of the unsharded parameter.
        trainable: `requires_grad`.
        used: it received a gradient in the trace; False throughout in evaluation.
        block: name of the repeated block, or the module of `Workload.wraps`, whose FSDP group owns it; None for the
            root group.
        aliases: its other names.
        embedding: whether it is the table of an embedding.
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
    """One section of the step, in executed order: a run of a repeated block, or the operations between two blocks.

    Live bytes are activations and temporaries. Parameters, buffers, the batch and accumulated gradients are left out; a
    gradient counts until it is in `.grad`. The backward of a segment is that of the autograd nodes its forward made.

    Attributes:
        block: name of the block, or of a module of `Workload.wraps`; None for the operations between them. A block that
            runs twice appears twice.
        forward_flops: floating-point operations of matrix products and convolutions.
        backward_flops: the same in backward.
        forward_moved_bytes: bytes that the operations read and write.
        backward_moved_bytes: the same in backward.
        forward_large_bytes: bytes of the tensors of `LARGE_BYTES` or more that operations make.
        backward_large_bytes: the same in backward.
        input_bytes: activations that enter the block and none before: what recomputation keeps; 0 outside of blocks.
        saved_bytes: bytes first saved for backward here; each storage once, without parameters, buffers and the batch.
        forward_entry_bytes: live bytes when the forward begins.
        forward_peak_bytes: peak live bytes of the forward.
        forward_exit_bytes: live bytes when the forward ends.
        backward_entry_bytes: live bytes when the backward begins.
        backward_peak_bytes: peak live bytes of the backward.
        backward_exit_bytes: live bytes when the backward ends.
        saved_copy_bytes: the part of `saved_bytes` in copies that casts make of the matrices that blocks own; FSDP
            all-gathers these in the compute dtype and makes no copies.
        forward_copy_bytes: bytes that such copies, of all segments, add to `forward_peak_bytes`.
        backward_copy_bytes: bytes that they add to `backward_peak_bytes`.
        moved_copy_bytes: the part of `forward_moved_bytes` that those casts read and write.
        product_bytes: bytes of the results of matrix products, convolutions and attention in the forward.
        moved_product_bytes: the part of `forward_moved_bytes` that these read and write.
        backward_gradient_bytes: bytes that finished gradients of its backward add to `backward_peak_bytes`, which
            counts a gradient only until it is in `.grad`; None if not known.
        completed: names of the parameters whose gradient is finished during its backward.
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
        precision: Lightning's name of the precision, as a Plan has it.
        segments: the segments in executed order.
        largest_temporary_bytes: bytes of the largest single storage that an operation made and did not save for
            backward.
        loss_peak_bytes: peak live bytes of what follows the last block (logits, loss), in either direction.
        output_bytes: bytes of the tensors that the step returned.
    """

    precision: str
    segments: tuple[Segment, ...]
    largest_temporary_bytes: int = 0
    loss_peak_bytes: int = 0
    output_bytes: int = 0

    @property
    def saved_bytes(self) -> int:
        """Bytes that all segments save for backward."""
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
        """Peak live bytes of the step."""
        return max((max(s.forward_peak_bytes, s.backward_peak_bytes) for s in self.segments), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerNeeds:
    """The state that one optimizer of the module keeps, and the temporaries of its `step()`.

    Attributes:
        class_name: name of the optimizer's class.
        state_bytes: bytes of the unsharded optimizer state, by name of the parameter.
        step_temporary_largest: peak temporaries of `step()` as a multiple of the largest trainable parameter's bytes.
        step_temporary_total: the same as a multiple of all trainable bytes; one of the two is 0.
        moved_bytes: bytes that the operations of one `step()` read and write.
        unpaged_bytes: the part of `state_bytes` in tensors that do not have the parameter's shape, such as one value a
            row; it is not paged.
        divisible: whether a step on some elements of a parameter updates them as a step on all elements does.
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
    """How the parameters of a block are sharded among the ranks of tensor parallelism.

    Attributes:
        parts: the sharding of each sharded parameter, by its name in the block; other parameters stay replicated.
        whole: by name, the reason why a matrix stays replicated.
        saved_share: bytes that one rank saves for backward, as a share of those of the unsharded forward.
        flops_share: floating-point operations of one rank's forward, as a share of those of the unsharded forward.
        forward_reduced: bytes of each tensor that is all-reduced in forward.
        backward_reduced: the same in backward.
        forward_halves: bytes of each unsharded tensor that is all-gathered or reduce-scattered in forward.
        backward_halves: the same in backward.
        sequence: the costs if the ranks share the sequence between the matrices; None if they cannot.
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
        """Return the division for `share` times the samples."""
        scaled: dict[str, Any] = {
            name: tuple(round(size * share) for size in getattr(self, name)) for name in _COMMUNICATED
        }
        sequence = None if self.sequence is None else self.sequence.scaled(share)
        return dataclasses.replace(self, **scaled, sequence=sequence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The resources that one step of a module needs on one device, and the sharding that its structure permits.

    Attributes:
        name: name of the module's class.
        parameters: the parameters, each once.
        buffer_bytes: bytes of all buffers.
        optimizers: the needs of the optimizers of `configure_optimizers`, in its order; empty outside fit.
        steps: the traced step by precision.
        batch_samples: samples in the traced batch.
        batch_bytes: bytes of the tensors of the traced batch.
        blocks: names of the repeated blocks.
        wraps: names of large modules outside of blocks whose parameters no other module reads in the step.
        divisions: by number of tensor-parallel ranks, how these shard each block, by its name; "" is what lies outside
            of blocks.
        stage: "fit", "validate", "test" or "predict".
        branches: whether the step reads numbers off tensors, so that ranks may run different modules.
        whole: why parameters can be neither sharded nor offloaded, and a remedy; empty if they can.
        approximate: why the numbers are not exact, a sentence each; empty if they are exact.
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
        """Run one step of `module` on fake tensors, which allocate nothing, and record its needs; `module` is kept.

        Args:
            module: a LightningModule, or any module: then its forward, with the sum of its floating outputs as loss.
            batch: the input of the step, on the CPU; any nesting of tensors. If None, only the parameters are used.
            step: "training_step", "validation_step", "test_step", "predict_step", or "forward": forward and backward.
            precisions: precisions to trace, by Lightning's names, as a Plan has them; "bf16-true", "16-true" and
                "64-true" require a converted module.
            batch_idx: the batch index passed to the step.
            device_type: the device whose kernels and optimizer defaults count: "cpu" or "cuda".
            tp_sizes: numbers of tensor-parallel ranks for which to find what can be sharded.

        Returns:
            The workload. If the step cannot run on fakes, it is extrapolated from a real step on one sample and on two.
            If the step can run in some precisions only, the others are left out of `steps`; if in none, the workload is
            estimated from the parameters. `approximate` says which applies and why.

        Raises:
            PlanError: `step` or a precision is not one of those above, `precisions` is empty, the module is not
                converted to a precision, or a parameter or buffer of a lazy module has no shape yet.
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
        """Scale the step to `samples` samples: live and saved bytes, FLOPs and the batch grow in proportion."""
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
        """Return the workload as plain dicts, lists, numbers and text, for JSON."""
        fields = dataclasses.asdict(self)
        for blocks in fields["divisions"].values():
            for found in blocks.values():
                _forget_origins(found)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Workload:
        """Rebuild the workload from the result of `to_dict`, also after a round trip through JSON.

        Raises:
            PlanError: a field is missing, unknown, or not of the accepted type.
        """
        return from_fields(cls, fields, "workload")


def _forget_origins(found: dict[str, Any]) -> None:
    """Remove the origins of a division, which only the search for it needs and JSON cannot represent."""
    for part in found["parts"].values():
        del part["origins"]
    if found["sequence"] is not None:
        _forget_origins(found["sequence"])


def only_blocks(step: Step, names: Collection[str]) -> Step:
    """Keep the block names of `step` that are in `names`; other segments become segments outside of blocks."""
    segments = (s if s.block in names else dataclasses.replace(s, block=None) for s in step.segments)
    return dataclasses.replace(step, segments=tuple(segments))


def combine_steps(steps: Sequence[Step], rule: Callable[..., float]) -> Step:
    """Combine `steps` number by number: each is `rule` of the numbers of `steps`, rounded, never below 0.

    `backward_gradient_bytes` and `completed` are those of the first step.

    Args:
        steps: the steps, which have the same segments.
        rule: combines one number of each step.
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
