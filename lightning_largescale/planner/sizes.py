"""The sizes of one plan that the terms of `memory` and `runtime` are made of: bytes on one rank.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from lightning_largescale.plan import MATMUL_TYPE, Plan
from lightning_largescale.workload import Divided, Parameter, Segment, Step, Workload
from lightning_largescale.workload.model import only_blocks

# Of a row's number, as tables are given it.
_ID_BYTES = 8


def local_bytes(parameter: Parameter, dp_shard: int, tp: int = 1, tp_dim: int | None = None) -> int:
    """Bytes of the largest shard of `parameter`: what `tp` ranks have of its dimension `tp_dim`, if that is one; of
    that, rows of its first dimension divided among `dp_shard` ranks, rounded up.

    Source: torch.distributed.fsdp.fully_shard, "Shard(0)" with padding to the largest chunk.
    """
    part = parameter.bytes if tp_dim is None else parameter.bytes // tp
    if dp_shard == 1 or not parameter.shape or parameter.shape[0] == 0:
        return part
    rows = parameter.shape[0] // tp if tp_dim == 0 else parameter.shape[0]
    return math.ceil(rows / dp_shard) * (part // rows)


def _row_bytes(parameter: Parameter) -> int:
    return parameter.bytes // max(1, parameter.shape[0])


class Sizes:
    """The sizes that the terms are made of, in bytes on one rank, computed once for a plan.

    Lists have an item a segment, so that a step of many segments is priced in time that grows with their number.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        kind: str,
        accumulate_grad_batches: int = 1,
    ) -> None:
        """Sizes of `plan`."""
        every = frozenset(workload.blocks if plan.activation_checkpointing == "full" else ())
        self._recomputed = every | frozenset(plan.checkpointed_blocks or ())
        self.workload, self.plan, self.kind = workload, plan, kind
        self.accumulate = accumulate_grad_batches
        self.divisions = workload.divisions.get(plan.tp, {})
        self._tp_dims = {
            f"{block}.{name}" if block else name: part.dim
            for block, found in self.divisions.items()
            for name, part in found.parts.items()
        }
        # What each block costs under tensor parallelism, by name; "" is what lies outside of blocks.
        self.tensor_costs = {
            block: (found.sequence if plan.sequence_parallel else None) or found
            for block, found in self.divisions.items()
        }
        tables = {f"{name}.weight" for name in plan.row_sharded_embeddings} if plan.world_size > 1 else set()
        # Parameters whose rows are divided over all ranks.
        self.tables = [p for p in workload.parameters if not tables.isdisjoint((p.name, *p.aliases))]
        self._table_names = {parameter.name for parameter in self.tables}
        # Groups of the plan: other modules go with the root.
        self._groups_of = {*workload.blocks, *plan.wrapped_modules}
        self.step: Step = only_blocks(workload.steps[plan.precision], self._groups_of)
        if self._mixed:
            self.step = without_copies(self.step)
        if self.divisions:
            self.step = divided_step(self.step, self.tensor_costs, plan.wrapped_modules)
        self._gathered: dict[str | None, int] = {}
        self._gradients: dict[tuple[str | None, bool], int] = {}

    @cached_property
    def sharded(self) -> bool:
        """Whether parameters are divided among ranks."""
        return self.plan.shards

    def local(self, parameter: Parameter) -> int:
        """What the rank keeps of `parameter`, bytes."""
        if parameter.name in self._table_names:
            return math.ceil(parameter.shape[0] / self.plan.world_size) * _row_bytes(parameter)
        return local_bytes(parameter, self.plan.dp_shard, self.plan.tp, self._tp_dims.get(parameter.name))

    def part(self, parameter: Parameter) -> int:
        """What the rank computes with of `parameter`: its part under tensor parallelism, else all."""
        return local_bytes(parameter, 1, self.plan.tp, self._tp_dims.get(parameter.name))

    def gradient_of(self, parameter: Parameter) -> int:
        """What the rank keeps of the gradient of `parameter`: of a row-sharded table the rows that were looked up."""
        if parameter.name not in self._table_names:
            return self.local(parameter)
        return min(self.local(parameter), self.looked_up * _row_bytes(parameter))

    @cached_property
    def looked_up(self) -> int:
        """How many rows of one table a rank looks up in a micro-batch at most: as if its batch were ids, and no other.

        Other ranks look up as many of the rows that it holds as it looks up of theirs.
        """
        return self.workload.batch_bytes // _ID_BYTES

    @cached_property
    def table_gradients(self) -> int:
        """Gradients of row-sharded tables in one optimizer step."""
        trained = [parameter for parameter in self.tables if parameter.trainable and parameter.used]
        return sum(map(self.gradient_of, trained)) if self._trains else 0

    @cached_property
    def full_parameters(self) -> int:
        """All parameters, undivided."""
        return sum(parameter.bytes for parameter in self.workload.parameters)

    @cached_property
    def parameters(self) -> int:
        """What the rank keeps of the parameters between steps."""
        return sum(self.local(parameter) for parameter in self.workload.parameters)

    @cached_property
    def gradients(self) -> int:
        """All gradients of one optimizer step, as they are kept between backward and the step.

        Replicas have buckets for every trainable parameter, used or not.
        """
        in_buckets = self.plan.dp_replicate > 1 and not self.sharded
        kept = [p for p in self.workload.parameters if p.trainable] if in_buckets else self.trained
        return sum(self.gradient_of(p) for p in kept) if self._trains else 0

    @cached_property
    def optimizer_state(self) -> int:
        """What the rank keeps of every optimizer's state, divided as the parameters are."""
        total = 0.0
        for needs in self.workload.optimizers:
            for parameter in self.workload.parameters:
                share = self.local(parameter) / parameter.bytes if parameter.bytes else 1.0
                total += needs.state_bytes.get(parameter.name, 0) * share
        return int(total)

    @cached_property
    def optimizer_temporaries(self) -> int:
        """The most that one optimizer's `step()` allocates for a while."""
        local = [self.gradient_of(p) for p in self.trained]
        return max(
            (
                int(needs.step_temporary_largest * max(local, default=0) + needs.step_temporary_total * sum(local))
                for needs in self.workload.optimizers
            ),
            default=0,
        )

    def gathered(self, block: str | None) -> int:
        """Whole parameters of one group while it computes, padding included; the root group's under None."""
        if block not in self._gathered:
            whole = sum(self.local(p) * self.plan.dp_shard for p in self._group(block))
            halves = self._mixed and block in self.workload.blocks
            self._gathered[block] = whole // 2 if halves else whole
        return self._gathered[block]

    def gradient(self, block: str | None, *, whole: bool) -> int:
        """Gradients of one group: unsharded as autograd makes them, or the rank's shard."""
        if (block, whole) not in self._gradients:
            group = [parameter for parameter in self._group(block) if parameter.trainable and parameter.used]
            sizes = (self.part(p) if whole else self.local(p) for p in group)
            self._gradients[block, whole] = sum(sizes)
        return self._gradients[block, whole]

    def recomputing(self, blocks: frozenset[str]) -> Sizes:
        """The sizes of the plan if it recomputed `blocks`; what does not depend on them is shared."""
        # Computed here if it is not yet, so that it is not by each.
        for name in ("parameters", "gradients", "optimizer_state", "optimizer_temporaries", "full_parameters"):
            getattr(self, name)
        if self.sharded:
            _ = self.gathered_so_far
        _ = self.gradients_from_here
        other = copy.copy(self)
        other._recomputed = blocks
        vars(other).pop("dropped", None)
        return other

    def recomputes(self, segment: Segment) -> bool:
        """Whether the forward of `segment` runs again in backward."""
        return segment.block in self._recomputed

    def kept(self, segment: Segment) -> int:
        """What recomputing `segment` keeps of the results that it makes, bytes."""
        return segment.product_bytes if self.plan.checkpointed_operations == "cheap" else 0

    def saving(self, segment: Segment) -> int:
        """What recomputing `segment` does not keep of what it saves, bytes."""
        return max(0, segment.saved_bytes - segment.input_bytes - self.kept(segment))

    @cached_property
    def dropped(self) -> list[int]:
        """What recomputation does not keep of the segments before each."""
        savings = (self.saving(segment) if self.recomputes(segment) else 0 for segment in self.step.segments)
        return [*accumulate(savings, initial=0)][:-1]

    @cached_property
    def gathered_so_far(self) -> list[int]:
        """Whole parameters of the root and of every block up to each segment, its own included."""
        return [self.gathered(None) + size for size in _running(self._blocks, self.gathered)]

    @cached_property
    def gradients_from_here(self) -> list[int]:
        """The rank's gradients of every block from each segment on, its own included; one item more, 0."""
        sums = _running(self._blocks[::-1], lambda block: self.gradient(block, whole=False))
        return [*sums[::-1], 0]

    @cached_property
    def _blocks(self) -> list[str | None]:
        return [segment.block for segment in self.step.segments]

    @cached_property
    def _trains(self) -> bool:
        return self.workload.stage == "fit"

    @cached_property
    def _mixed(self) -> bool:
        return self.sharded and self.plan.precision in ("bf16-mixed", "16-mixed")

    @cached_property
    def trained(self) -> list[Parameter]:
        """Parameters that receive a gradient in a step."""
        return [p for p in self.workload.parameters if p.trainable and p.used]

    @cached_property
    def groups(self) -> dict[str | None, list[Parameter]]:
        """Parameters that are gathered together, by block; those of the root group under None."""
        groups: dict[str | None, list[Parameter]] = {}
        for parameter in self.workload.parameters:
            if parameter.name in self._table_names:
                continue
            # Under mixed precision blocks gather matrices in half the bytes; vectors go with the root, in fp32.
            block = parameter.block if parameter.block in self._groups_of else None
            if self._mixed and len(parameter.shape) < 2 and block not in self.plan.wrapped_modules:
                block = None
            groups.setdefault(block, []).append(parameter)
        return groups

    def _group(self, block: str | None) -> list[Parameter]:
        return self.groups.get(block, [])


def without_copies(step: Step) -> Step:
    """`step` as it runs where blocks gather their matrices in the type of compute, so that casts make no copies.

    Source: torch.distributed.fsdp.MixedPrecisionPolicy, `param_dtype`.
    """
    segments: list[Segment] = []
    before = 0
    for segment in step.segments:
        after = before + segment.saved_copy_bytes
        segments.append(
            replace(
                segment,
                forward_moved_bytes=segment.forward_moved_bytes - segment.moved_copy_bytes,
                saved_bytes=segment.saved_bytes - segment.saved_copy_bytes,
                forward_entry_bytes=max(0, segment.forward_entry_bytes - before),
                forward_peak_bytes=segment.forward_peak_bytes - segment.forward_copy_bytes,
                forward_exit_bytes=max(0, segment.forward_exit_bytes - after),
                backward_entry_bytes=max(0, segment.backward_entry_bytes - after),
                backward_peak_bytes=segment.backward_peak_bytes - segment.backward_copy_bytes,
                backward_exit_bytes=max(0, segment.backward_exit_bytes - before),
                saved_copy_bytes=0,
                forward_copy_bytes=0,
                backward_copy_bytes=0,
                moved_copy_bytes=0,
            )
        )
        before = after
    return replace(step, segments=tuple(segments), loss_peak_bytes=max(0, step.loss_peak_bytes - before))


def divided_step(step: Step, costs: Mapping[str, Divided], wraps: Collection[str] = ()) -> Step:
    """`step` as one rank of tensor parallelism runs it: of a block that is divided it computes and saves a share, and
    so of what lies outside of blocks, `wraps` among it.

    What a block holds for a while is taken to be divided as what it saves.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.
    """
    segments: list[Segment] = []
    # Bytes less that are live before a segment, and after it.
    before = 0
    for segment in step.segments:
        found = costs.get("" if segment.block is None or segment.block in wraps else segment.block, Divided())
        saved = int(segment.saved_bytes * found.saved_share)
        after = before + segment.saved_bytes - saved
        inside = {
            f"{way}_peak_bytes": max(
                0,
                entry - less + int((getattr(segment, f"{way}_peak_bytes") - entry) * found.saved_share),
            )
            for way, entry, less in (
                ("forward", segment.forward_entry_bytes, before),
                ("backward", segment.backward_entry_bytes, after),
            )
        }
        scaled = {
            name: int(getattr(segment, name) * share)
            for share, names in (
                (found.flops_share, ("forward_flops", "backward_flops")),
                (
                    found.saved_share,
                    (
                        "forward_moved_bytes",
                        "backward_moved_bytes",
                        "forward_large_bytes",
                        "backward_large_bytes",
                        "moved_product_bytes",
                    ),
                ),
            )
            for name in names
        }
        segments.append(
            replace(
                segment,
                **inside,  # type: ignore[arg-type]
                **scaled,  # type: ignore[arg-type]
                saved_bytes=saved,
                product_bytes=_kept_of_products(segment, found, step.precision),
                forward_entry_bytes=max(0, segment.forward_entry_bytes - before),
                forward_exit_bytes=max(0, segment.forward_exit_bytes - after),
                backward_entry_bytes=max(0, segment.backward_entry_bytes - after),
                backward_exit_bytes=max(0, segment.backward_exit_bytes - before),
            )
        )
        before = after
    return replace(step, segments=tuple(segments), loss_peak_bytes=max(0, step.loss_peak_bytes - before))


def communicated_share(precision: str) -> float:
    """Of the bytes that a division says are communicated, those in `precision`: what was looked at is float32."""
    return 0.5 if precision != "32-true" and MATMUL_TYPE[precision] != "float64" else 1.0


def _kept_of_products(segment: Segment, found: Divided, precision: str) -> int:
    """Results of products on one rank that are still theirs later on: sums over the ranks are made in their place, but
    for those of which each rank gets a part.
    """
    share = communicated_share(precision)
    scattered = int(share * sum(found.forward_halves)) // 2
    summed = int(share * sum(found.forward_reduced)) + scattered
    return int(max(0, segment.product_bytes - summed) * found.flops_share) + scattered


def _running(blocks: list[str | None], size: Callable[[str], int]) -> list[int]:
    """At each place the sum of `size` over the blocks up to there, each once."""
    seen: set[str | None] = {None}
    sums: list[int] = []
    total = 0
    for block in blocks:
        if block is not None and block not in seen:
            seen.add(block)
            total += size(block)
        sums.append(total)
    return sums
