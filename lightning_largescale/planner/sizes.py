"""The sizes of one plan that the terms of `memory` and `runtime` are made of: bytes on one rank.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

from lightning_largescale.plan import Plan
from lightning_largescale.planner.as_run import divided_step, without_copies
from lightning_largescale.planner.paging import Paging
from lightning_largescale.planner.placement import Placement, place
from lightning_largescale.tiers import shard_bytes
from lightning_largescale.workload import Parameter, Segment, Step, Workload
from lightning_largescale.workload.workload import only_blocks

# Of a row's number, as tables are given it.
_ID_BYTES = 8


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
        self.workload, self.plan, self.kind = workload, plan, kind
        self._recomputed = _recomputed(workload, plan)
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
        self._states: dict[str | None, int] = {}
        self._shards: dict[str | None, int] = {}
        self._gradients: dict[tuple[str | None, bool], int] = {}

    @cached_property
    def gathers(self) -> bool:
        """Whether parameters are brought together, group by group: from ranks, or from another tier."""
        return self.plan.gathers

    @cached_property
    def reductions(self) -> int:
        """How often a step reduces gradients: once, unless whole ones have no place between micro-batches."""
        return 1 if self.plan.offload_parameters is None else self.accumulate

    @cached_property
    def placement(self) -> Placement:
        """Which bytes are kept in which tier."""
        return place(self)

    @cached_property
    def movable(self) -> list[str]:
        """Groups whose parameters can be kept elsewhere, in the module's order: all but the root's."""
        return [name for name in self.groups if name is not None]

    def shard(self, block: str | None) -> int:
        """What the rank keeps of the parameters of one group between its uses."""
        if block not in self._shards:
            self._shards[block] = sum(map(self.local, self._group(block)))
        return self._shards[block]

    def local(self, parameter: Parameter) -> int:
        """What the rank keeps of `parameter`, bytes."""
        return self._locals[parameter.name]

    @cached_property
    def _locals(self) -> dict[str, int]:
        plan, found = self.plan, {}
        for one in self.workload.parameters:
            dim = self._tp_dims.get(one.name)
            found[one.name] = shard_bytes(one.shape, one.bytes, plan.dp_shard, plan.tp, dim)
        for table in self.tables:
            found[table.name] = math.ceil(table.shape[0] / plan.world_size) * _row_bytes(table)
        return found

    def part(self, parameter: Parameter) -> int:
        """What the rank computes with of `parameter`: its part under tensor parallelism, else all."""
        return shard_bytes(parameter.shape, parameter.bytes, 1, self.plan.tp, self._tp_dims.get(parameter.name))

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
        return sum(map(self.shard, self.groups)) + sum(map(self.local, self.tables))

    @cached_property
    def gradients(self) -> int:
        """All gradients of one optimizer step, as they are kept between backward and the step.

        Replicas have buckets for every trainable parameter, used or not.
        """
        in_buckets = self.plan.dp_replicate > 1 and not self.gathers
        kept = [p for p in self.workload.parameters if p.trainable] if in_buckets else self.trained
        return sum(self.gradient_of(p) for p in kept) if self._trains else 0

    @cached_property
    def optimizer_state(self) -> int:
        """What the rank keeps of every optimizer's state, divided as the parameters are."""
        return int(sum(map(self.state_of, self.workload.parameters)))

    def state(self, block: str | None) -> int:
        """What the rank keeps of every optimizer's state of one group's parameters."""
        if block not in self._states:
            self._states[block] = math.ceil(sum(map(self.state_of, self._group(block))))
        return self._states[block]

    def state_of(self, parameter: Parameter) -> float:
        """What the rank keeps of every optimizer's state of `parameter`."""
        found = sum(needs.state_bytes.get(parameter.name, 0) for needs in self.workload.optimizers)
        return found * self.share_of(parameter)

    def share_of(self, parameter: Parameter) -> float:
        """What the rank keeps of `parameter`, as a part of all of it."""
        return self.local(parameter) / parameter.bytes if parameter.bytes else 1.0

    @cached_property
    def paging(self) -> Paging:
        """What of the optimizers' step pages can have."""
        return Paging(self)

    @cached_property
    def stepped(self) -> dict[str | None, tuple[int, int]]:
        """By group, bytes of what is stepped on: of the largest gradient, and of all; row-sharded tables under ""."""
        found: dict[str | None, tuple[int, int]] = {}
        groups = {**self.groups, "": self.tables}
        for name, group in groups.items():
            local = [self.gradient_of(p) for p in group if p.trainable and p.used]
            found[name] = (max(local, default=0), sum(local))
        return found

    @cached_property
    def trained_bytes(self) -> int:
        """Of the rank's parameters, those that are stepped on."""
        return sum(total for _, total in self.stepped.values())

    def gathered(self, block: str | None) -> int:
        """Whole parameters of one group while it computes, padding included; the root group's under None."""
        if block not in self._gathered:
            whole = self.shard(block) * self.plan.dp_shard
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
        other = self._sharing(("dropped", "leaving"))
        other._recomputed = blocks
        return other

    def placing(self, plan: Plan) -> Sizes:
        """The sizes of `plan`, which differs from theirs in what it keeps in other tiers or recomputes; all else is
        shared. It must gather parameters if theirs does.
        """
        other = self._sharing(("dropped", "leaving", "placement", "reductions", "kept_from_here", "passing_gradients"))
        other.plan, other._recomputed = plan, _recomputed(self.workload, plan)
        return other

    def _sharing(self, but: tuple[str, ...]) -> Sizes:
        # Computed here if it is not yet, so that it is not by each.
        for name in (
            "parameters",
            "gradients",
            "optimizer_state",
            "full_parameters",
            "trained_bytes",
            "groups",
            "paging",
        ):
            getattr(self, name)
        if self.gathers:
            _ = self.gathered_so_far
        _ = self.kept_from_here
        other = copy.copy(self)
        for name in but:
            vars(other).pop(name, None)
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
        """What of the segments before each is neither kept, by recomputation, nor there, being in another tier."""
        gone = (
            leaving + (self.saving(segment) if self.recomputes(segment) else 0)
            for segment, leaving in zip(self.step.segments, self.leaving, strict=True)
        )
        return [*accumulate(gone, initial=0)][:-1]

    @cached_property
    def leaving(self) -> list[int]:
        """What of that which each segment saves for backward is moved out of the device's memory meanwhile."""
        if self.placement.activations not in self.placement.outside:
            return [0] * len(self.step.segments)
        return [self.leaving_of(segment) for segment in self.step.segments]

    def leaving_of(self, segment: Segment) -> int:
        """What of that which `segment` saves for backward is kept in another tier meanwhile."""
        if segment.block not in self.placement.blocks:
            return 0
        return segment.saved_bytes - (self.saving(segment) if self.recomputes(segment) else 0)

    @cached_property
    def gathered_so_far(self) -> list[int]:
        """Whole parameters of the root and of every block up to each segment, its own included."""
        return [self.gathered(None) + size for size in _running(self.blocks, self.gathered)]

    @cached_property
    def kept_from_here(self) -> list[int]:
        """Those of the rank's gradients that stay until the optimizer's step, of every block from each segment on, its
        own included; one item more, 0.
        """
        sums = _running(self.blocks[::-1], self.kept_gradient)
        return [*sums[::-1], 0]

    def own_gradient(self, index: int) -> int:
        """Those of the whole gradients of its block that are there at the worst moment of segment `index`'s backward.

        On CPU all of them, as in `root_gradient`.
        """
        segment = self.step.segments[index]
        if segment.block is None:
            return 0
        total, known = self.gradient(segment.block, whole=True), segment.backward_gradient_bytes
        return total if self.kind == "cpu" or known is None else min(total, known)

    def root_gradient(self, index: int, *, whole: bool) -> int:
        """Those of the root group's gradients that are there while segment `index` runs backward.

        On CPU all of them: the holes in its heap were measured beside that.
        """
        if self.kind == "cpu":
            return self.gradient(None, whole=whole)
        of = self._root_parts if whole else self._root_locals
        return of[index]

    @cached_property
    def _root_parts(self) -> list[int]:
        return self._root_so_far(self.part)

    @cached_property
    def _root_locals(self) -> list[int]:
        return self._root_so_far(self.local)

    def _root_so_far(self, size: Callable[[Parameter], int]) -> list[int]:
        """At each segment the sum of `size` over the root's parameters whose gradient has come when it runs backward;
        those that the trace did not see come first.
        """
        came = {name: index for index, segment in enumerate(self.step.segments) for name in segment.completed}
        sums = [0] * len(self.step.segments)
        for one in self._group(None):
            if one.trainable and one.used:
                sums[came.get(one.name, -1)] += size(one)
        return [*accumulate(reversed(sums))][::-1]

    @cached_property
    def passing_gradients(self) -> int:
        """The rank's gradients of all groups whose gradients are there for a while only."""
        return sum(self.gradient(block, whole=False) for block in self.groups if self.passes(block))

    def passes(self, block: str | None) -> bool:
        """Whether the gradients of a group are there for a while only: used at once, or moved to another tier."""
        return block is not None and (self.plan.release_gradients or block in self.placement.away)

    def kept_gradient(self, block: str | None) -> int:
        """The rank's gradients of one group, if they stay until the optimizer's step."""
        return 0 if self.passes(block) else self.gradient(block, whole=False)

    @cached_property
    def blocks(self) -> list[str | None]:
        """The group of each segment."""
        return [segment.block for segment in self.step.segments]

    @cached_property
    def _trains(self) -> bool:
        return self.workload.stage == "fit"

    @cached_property
    def _mixed(self) -> bool:
        return self.gathers and self.plan.precision in ("bf16-mixed", "16-mixed")

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


def _recomputed(workload: Workload, plan: Plan) -> frozenset[str]:
    every = workload.blocks if plan.activation_checkpointing == "full" else ()
    return frozenset((*every, *(plan.checkpointed_blocks or ())))


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
