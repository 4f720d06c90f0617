"""Sizes of one plan, in bytes on one rank, from which the terms of `peak_memory` and `runtime` are computed.

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
from lightning_largescale.tiers import pinned_bytes, shard_bytes
from lightning_largescale.workload import Parameter, Segment, Step, Workload
from lightning_largescale.workload.workload import only_blocks

# Bytes of a row id, as tables receive it.
_ID_BYTES = 8


def _row_bytes(parameter: Parameter) -> int:
    return parameter.bytes // max(1, parameter.shape[0])


class Sizes:
    """The sizes of one plan, in bytes on one rank, computed once.

    Lists have one item per segment, so that a step is priced in time linear in its segments.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        kind: str,
        accumulate_grad_batches: int = 1,
    ) -> None:
        """Create the sizes of `plan` on devices of `kind`."""
        self.workload, self.plan, self.kind = workload, plan, kind
        self._recomputed = _recomputed(workload, plan)
        self.accumulate = accumulate_grad_batches
        self.divisions = workload.divisions.get(plan.tp, {})
        self._tp_dims = {
            f"{block}.{name}" if block else name: part.dim
            for block, found in self.divisions.items()
            for name, part in found.parts.items()
        }
        # The tensor-parallel costs of each block, by name; "" is the code outside of blocks.
        self.tensor_costs = {
            block: (found.sequence if plan.sequence_parallel else None) or found
            for block, found in self.divisions.items()
        }
        tables = {f"{name}.weight" for name in plan.row_sharded_embeddings} if plan.world_size > 1 else set()
        # Parameters whose rows are sharded over all ranks.
        self.tables = [p for p in workload.parameters if not tables.isdisjoint((p.name, *p.aliases))]
        self._table_names = {parameter.name for parameter in self.tables}
        # The FSDP groups of the plan; other modules belong to the root group.
        self._groups_of = {*workload.blocks, *plan.wrapped_modules}
        self.step: Step = only_blocks(workload.steps[plan.precision], self._groups_of)
        if self._mixed:
            self.step = without_copies(self.step)
        if self.divisions:
            self.step = divided_step(self.step, self.tensor_costs, plan.wrapped_modules)
        self._gathered: dict[str | None, int] = {}
        self._states: dict[str | None, int] = {}
        self._shards: dict[str | None, int] = {}
        self._pinned: dict[str | None, tuple[int, int]] = {}
        self._gradients: dict[tuple[str | None, bool], int] = {}

    @cached_property
    def gathers(self) -> bool:
        """Return whether parameters are gathered group by group, from other ranks or from another tier."""
        return self.plan.gathers

    @cached_property
    def reductions(self) -> int:
        """Number of gradient reductions in a step: one, or one per micro-batch if parameters are offloaded.

        Unsharded gradients then have no place between micro-batches.
        """
        return 1 if self.plan.offload_parameters is None else self.accumulate

    @cached_property
    def placement(self) -> Placement:
        """The placement of the plan: which bytes are kept in which tier."""
        return place(self)

    @cached_property
    def movable(self) -> list[str]:
        """Groups whose parameters can be offloaded, in the module's order: all but the root."""
        return [name for name in self.groups if name is not None]

    def shard(self, block: str | None) -> int:
        """Return the bytes of one group's parameters that the rank keeps between their uses."""
        if block not in self._shards:
            self._shards[block] = sum(map(self.local, self._group(block)))
        return self._shards[block]

    def pinned(self, block: str | None) -> tuple[int, int]:
        """Return the bytes of pinned memory that one group's shard takes, and those that its gradients take."""
        if block not in self._pinned:
            group = [(pinned_bytes(self.local(one)), one.trainable and one.used) for one in self._group(block)]
            self._pinned[block] = sum(size for size, _ in group), sum(size for size, trained in group if trained)
        return self._pinned[block]

    def local(self, parameter: Parameter) -> int:
        """Return the bytes of `parameter` that the rank keeps."""
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
        """Return the bytes of `parameter` that the rank computes with: its tensor-parallel shard, else all of it."""
        return shard_bytes(parameter.shape, parameter.bytes, 1, self.plan.tp, self._tp_dims.get(parameter.name))

    def gradient_of(self, parameter: Parameter) -> int:
        """Return the gradient bytes of `parameter` that the rank keeps; for a row-sharded table, of looked-up rows."""
        if parameter.name not in self._table_names:
            return self.local(parameter)
        return min(self.local(parameter), self.looked_up * _row_bytes(parameter))

    @cached_property
    def looked_up(self) -> int:
        """Upper bound of the rows of one table that a rank looks up per micro-batch, as if its batch were int64 ids.

        Other ranks are assumed to look up as many of this rank's rows as it looks up of theirs.
        """
        return self.workload.batch_bytes // _ID_BYTES

    @cached_property
    def table_gradients(self) -> int:
        """Gradient bytes of row-sharded tables in one optimizer step."""
        trained = [parameter for parameter in self.tables if parameter.trainable and parameter.used]
        return sum(map(self.gradient_of, trained)) if self._trains else 0

    @cached_property
    def full_parameters(self) -> int:
        """Bytes of all parameters, unsharded."""
        return sum(parameter.bytes for parameter in self.workload.parameters)

    @cached_property
    def parameters(self) -> int:
        """Bytes of the parameters that the rank keeps between steps."""
        return sum(map(self.shard, self.groups)) + sum(map(self.local, self.tables))

    @cached_property
    def gradients(self) -> int:
        """Bytes of all gradients that the rank keeps between backward and the optimizer's step.

        Replicas have buckets for every trainable parameter, used or not.
        """
        in_buckets = self.plan.dp_replicate > 1 and not self.gathers
        kept = [p for p in self.workload.parameters if p.trainable] if in_buckets else self.trained
        return sum(self.gradient_of(p) for p in kept) if self._trains else 0

    @cached_property
    def optimizer_state(self) -> int:
        """Bytes of all optimizers' state that the rank keeps, sharded as the parameters are."""
        return int(sum(map(self.state_of, self.workload.parameters)))

    def state(self, block: str | None) -> int:
        """Return the bytes of all optimizers' state of one group that the rank keeps."""
        if block not in self._states:
            self._states[block] = math.ceil(sum(map(self.state_of, self._group(block))))
        return self._states[block]

    def state_of(self, parameter: Parameter) -> float:
        """Return the bytes of all optimizers' state of `parameter` that the rank keeps."""
        found = sum(needs.state_bytes.get(parameter.name, 0) for needs in self.workload.optimizers)
        return found * self.share_of(parameter)

    def share_of(self, parameter: Parameter) -> float:
        """Return the fraction of `parameter` that the rank keeps."""
        return self.local(parameter) / parameter.bytes if parameter.bytes else 1.0

    @cached_property
    def paging(self) -> Paging:
        """The paged and unpaged bytes of the optimizers' step."""
        return Paging(self)

    @cached_property
    def stepped(self) -> dict[str | None, tuple[int, int]]:
        """Bytes of the largest and of all gradients stepped on, by group; row-sharded tables are under ""."""
        found: dict[str | None, tuple[int, int]] = {}
        groups = {**self.groups, "": self.tables}
        for name, group in groups.items():
            local = [self.gradient_of(p) for p in group if p.trainable and p.used]
            found[name] = (max(local, default=0), sum(local))
        return found

    @cached_property
    def trained_bytes(self) -> int:
        """Bytes of the rank's parameters that the optimizers step on."""
        return sum(total for _, total in self.stepped.values())

    def gathered(self, block: str | None) -> int:
        """Return the bytes of one group's unsharded parameters in computation, padding included; None is the root."""
        if block not in self._gathered:
            whole = self.shard(block) * self.plan.dp_shard
            halves = self._mixed and block in self.workload.blocks
            self._gathered[block] = whole // 2 if halves else whole
        return self._gathered[block]

    def gradient(self, block: str | None, *, whole: bool) -> int:
        """Return the gradient bytes of one group: unsharded as autograd makes them if `whole`, else the shard's."""
        if (block, whole) not in self._gradients:
            group = [parameter for parameter in self._group(block) if parameter.trainable and parameter.used]
            sizes = (self.part(p) if whole else self.local(p) for p in group)
            self._gradients[block, whole] = sum(sizes)
        return self._gradients[block, whole]

    def recomputing(self, blocks: frozenset[str]) -> Sizes:
        """Return the sizes of the plan if it recomputed `blocks`, sharing all that does not depend on these."""
        other = self._sharing(("dropped", "leaving"))
        other._recomputed = blocks
        return other

    def placing(self, plan: Plan) -> Sizes:
        """Return the sizes of `plan`, which may differ from this plan in offload and recomputation only.

        All else is shared. `plan` must gather parameters if this plan does.
        """
        other = self._sharing(("dropped", "leaving", "placement", "reductions", "kept_from_here", "passing_gradients"))
        other.plan, other._recomputed = plan, _recomputed(self.workload, plan)
        return other

    def _sharing(self, but: tuple[str, ...]) -> Sizes:
        # Compute these before copying, so that the copies share them.
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
        """Return whether the forward of `segment` runs again in backward."""
        return segment.block in self._recomputed

    def kept(self, segment: Segment) -> int:
        """Return the bytes of results of `segment` that its recomputation keeps."""
        return segment.product_bytes if self.plan.checkpointed_operations == "cheap" else 0

    def saving(self, segment: Segment) -> int:
        """Return the bytes of saved activations that recomputing `segment` frees."""
        return max(0, segment.saved_bytes - segment.input_bytes - self.kept(segment))

    @cached_property
    def dropped(self) -> list[int]:
        """For each segment, the activation bytes of the segments before it that are dropped or offloaded."""
        gone = (
            leaving + (self.saving(segment) if self.recomputes(segment) else 0)
            for segment, leaving in zip(self.step.segments, self.leaving, strict=True)
        )
        return [*accumulate(gone, initial=0)][:-1]

    @cached_property
    def leaving(self) -> list[int]:
        """For each segment, the bytes of saved activations that are moved out of the device's memory."""
        if self.placement.activations not in self.placement.outside:
            return [0] * len(self.step.segments)
        return [self.leaving_of(segment) for segment in self.step.segments]

    def leaving_of(self, segment: Segment) -> int:
        """Return the bytes of saved activations of `segment` that are kept in another tier."""
        if segment.block not in self.placement.blocks:
            return 0
        return segment.saved_bytes - (self.saving(segment) if self.recomputes(segment) else 0)

    @cached_property
    def gathered_so_far(self) -> list[int]:
        """For each segment, the unsharded parameter bytes of the root and of every block up to its own."""
        return [self.gathered(None) + size for size in _running(self.blocks, self.gathered)]

    @cached_property
    def kept_from_here(self) -> list[int]:
        """For each segment, the rank's gradient bytes, of its own and all later blocks, that stay until the step.

        The list ends with one more item, 0.
        """
        sums = _running(self.blocks[::-1], self.kept_gradient)
        return [*sums[::-1], 0]

    def own_gradient(self, index: int) -> int:
        """Return the unsharded gradient bytes of its block that are live at the peak of segment `index`'s backward.

        On CPU all of them, as in `root_gradient`.
        """
        segment = self.step.segments[index]
        if segment.block is None:
            return 0
        total, known = self.gradient(segment.block, whole=True), segment.backward_gradient_bytes
        return total if self.kind == "cpu" or known is None else min(total, known)

    def root_gradient(self, index: int, *, whole: bool) -> int:
        """Return the gradient bytes of the root group that are live while segment `index` runs backward.

        On CPU all of them: the fragmentation of its heap was measured with that.
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
        """Return, for each segment, the sum of `size` over the root's parameters whose gradients exist in its backward.

        Gradients that the trace did not see are assumed to exist first.
        """
        came = {name: index for index, segment in enumerate(self.step.segments) for name in segment.completed}
        sums = [0] * len(self.step.segments)
        for one in self._group(None):
            if one.trainable and one.used:
                sums[came.get(one.name, -1)] += size(one)
        return [*accumulate(reversed(sums))][::-1]

    @cached_property
    def passing_gradients(self) -> int:
        """The rank's gradient bytes of all groups whose gradients do not stay until the optimizer's step."""
        return sum(self.gradient(block, whole=False) for block in self.groups if self.passes(block))

    def passes(self, block: str | None) -> bool:
        """Return whether the gradients of a group leave the device early: released, or moved to another tier."""
        return block is not None and (self.plan.release_gradients or block in self.placement.away)

    def kept_gradient(self, block: str | None) -> int:
        """Return the rank's gradient bytes of one group that stay until the optimizer's step."""
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
        """Parameters that are gathered together, by block; the root group is under None."""
        groups: dict[str | None, list[Parameter]] = {}
        for parameter in self.workload.parameters:
            if parameter.name in self._table_names:
                continue
            # Under mixed precision blocks gather matrices in 16 bits; vectors belong to the root group, in fp32.
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
    """Return the running sums of `size` over `blocks`, counting each block once."""
    seen: set[str | None] = {None}
    sums: list[int] = []
    total = 0
    for block in blocks:
        if block is not None and block not in seen:
            seen.add(block)
            total += size(block)
        sums.append(total)
    return sums
