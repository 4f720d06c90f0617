"""Sizes of one layout of ranks, in bytes on one rank: parameters, gradients and optimizer state by group.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_largescale.planner.paging import Paging
from lightning_largescale.prices import PRICES
from lightning_largescale.tiers import pinned_bytes, shard_bytes

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Parameter, Step, Workload


class GroupSizes:
    """The sizes of a plan by group of parameters, whatever it offloads or recomputes, computed once.

    Attributes:
        workload: the traced step, of one rank's micro-batch.
        plan: the plan.
        kind: the kind of the devices.
        accumulate: micro-batches in a step.
        step: the step as a rank runs it.
        gathers: whether parameters are gathered group by group, from other ranks or from another tier.
        gather_ranks: number of ranks that a group is gathered from.
        halves: whether blocks gather their matrices in half the bytes.
        group_names: modules whose parameters are a group; all others belong to the root group.
        tensor_ranks: number of ranks that compute each sample together.
        tensor_dims: dimension in which these shard a parameter, by name; others are replicated.
        ungrouped: bytes of parameters and gradients that the rank keeps of parameters in no group, by name.
        in_buckets: whether gradients have a place each, used or not, which is not in groups.
    """

    def __init__(self, workload: Workload, plan: Plan, kind: str, accumulate_grad_batches: int = 1) -> None:
        """Create the sizes of `plan`.

        Args:
            workload: the traced step, of one rank's micro-batch.
            plan: the plan.
            kind: the kind of the devices.
            accumulate_grad_batches: micro-batches in a step.
        """
        self.workload, self.plan, self.kind, self.accumulate = workload, plan, kind, accumulate_grad_batches
        self.step: Step = next(iter(workload.steps.values()))
        self.gathers, self.gather_ranks, self.halves = plan.gathers, 1, False
        self.group_names = {*workload.blocks}
        self.tensor_ranks = 1
        self.tensor_dims: dict[str, int | None] = {}
        self.ungrouped: dict[str, tuple[int, int]] = {}
        self.in_buckets = False
        self._gathered: dict[str | None, int] = {}
        self._states: dict[str | None, int] = {}
        self._shards: dict[str | None, int] = {}
        self._pinned: dict[str | None, tuple[int, int]] = {}
        self._gradients: dict[tuple[str | None, bool], int] = {}
        for price in PRICES:
            price.lay_out(self)
        grouped = (s if s.block in self.group_names else dataclasses.replace(s, block=None) for s in self.step.segments)
        self.step = dataclasses.replace(self.step, segments=tuple(grouped))
        for price in PRICES:
            self.step = price.run(self, self.step)

    @cached_property
    def groups(self) -> dict[str | None, list[Parameter]]:
        """Parameters that are gathered together, by block; the root group is under None."""
        groups: dict[str | None, list[Parameter]] = {}
        for parameter in self.workload.parameters:
            if parameter.name in self.ungrouped:
                continue
            # Under mixed precision blocks gather matrices in 16 bits; vectors belong to the root group, in fp32.
            block = parameter.block if parameter.block in self.group_names else None
            if self.halves and len(parameter.shape) < 2 and block in self.workload.blocks:
                block = None
            groups.setdefault(block, []).append(parameter)
        return groups

    def _group(self, block: str | None) -> list[Parameter]:
        return self.groups.get(block, [])

    @cached_property
    def movable(self) -> list[str]:
        """Groups whose parameters can be offloaded, in the module's order: all but the root."""
        return [name for name in self.groups if name is not None]

    @cached_property
    def blocks(self) -> list[str | None]:
        """The group of each segment."""
        return [segment.block for segment in self.step.segments]

    @cached_property
    def trained(self) -> list[Parameter]:
        """Parameters that receive a gradient in a step."""
        return [p for p in self.workload.parameters if p.trainable and p.used]

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
        found = {}
        for one in self.workload.parameters:
            dim = self.tensor_dims.get(one.name)
            found[one.name] = shard_bytes(one.shape, one.bytes, self.gather_ranks, self.tensor_ranks, dim)
        return found | {name: kept for name, (kept, _) in self.ungrouped.items()}

    def part(self, parameter: Parameter) -> int:
        """Return the bytes of `parameter` that the rank computes with: its tensor-parallel shard, else all of it."""
        return shard_bytes(parameter.shape, parameter.bytes, 1, self.tensor_ranks, self.tensor_dims.get(parameter.name))

    def gathered(self, block: str | None) -> int:
        """Return the bytes of one group's unsharded parameters in computation, padding included; None is the root."""
        if block not in self._gathered:
            whole = self.shard(block) * self.gather_ranks
            self._gathered[block] = whole // 2 if self.halves and block in self.workload.blocks else whole
        return self._gathered[block]

    @cached_property
    def gathered_so_far(self) -> list[int]:
        """For each segment, the unsharded parameter bytes of the root and of every block up to its own."""
        return [self.gathered(None) + size for size in running_sums(self.blocks, self.gathered)]

    def gradient(self, block: str | None, *, whole: bool) -> int:
        """Return the gradient bytes of one group: unsharded as autograd makes them if `whole`, else the shard's."""
        if (block, whole) not in self._gradients:
            group = [parameter for parameter in self._group(block) if parameter.trainable and parameter.used]
            sizes = (self.part(p) if whole else self.local(p) for p in group)
            self._gradients[block, whole] = sum(sizes)
        return self._gradients[block, whole]

    def gradient_of(self, parameter: Parameter) -> int:
        """Return the gradient bytes of `parameter` that the rank keeps."""
        if parameter.name in self.ungrouped:
            return self.ungrouped[parameter.name][1]
        return self.local(parameter)

    @cached_property
    def ungrouped_parameters(self) -> list[Parameter]:
        """The parameters in no group."""
        return [parameter for parameter in self.workload.parameters if parameter.name in self.ungrouped]

    @cached_property
    def ungrouped_gradients(self) -> int:
        """Gradient bytes of the parameters in no group, in one optimizer step."""
        trained = [parameter for parameter in self.ungrouped_parameters if parameter.trainable and parameter.used]
        return sum(map(self.gradient_of, trained)) if self._trains else 0

    @cached_property
    def full_parameters(self) -> int:
        """Bytes of all parameters, unsharded."""
        return sum(parameter.bytes for parameter in self.workload.parameters)

    @cached_property
    def parameters(self) -> int:
        """Bytes of the parameters that the rank keeps between steps."""
        return sum(map(self.shard, self.groups)) + sum(map(self.local, self.ungrouped_parameters))

    @cached_property
    def gradients(self) -> int:
        """Bytes of all gradients that the rank keeps between backward and the optimizer's step."""
        kept = [p for p in self.workload.parameters if p.trainable] if self.in_buckets else self.trained
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
        """Bytes of the largest and of all gradients stepped on, by group; parameters in no group are under ""."""
        found: dict[str | None, tuple[int, int]] = {}
        groups = {**self.groups, "": self.ungrouped_parameters}
        for name, group in groups.items():
            local = [self.gradient_of(p) for p in group if p.trainable and p.used]
            found[name] = (max(local, default=0), sum(local))
        return found

    @cached_property
    def trained_bytes(self) -> int:
        """Bytes of the rank's parameters that the optimizers step on."""
        return sum(total for _, total in self.stepped.values())

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

    def block_beside(self, index: int, step: int) -> str | None:
        """Return the nearest other block before segment `index` (`step` -1) or after it (1); None if there is none."""
        own, index = self.blocks[index], index + step
        while 0 <= index < len(self.blocks):
            if self.blocks[index] not in (None, own):
                return self.blocks[index]
            index += step
        return None

    @property
    def beside_no_compute(self) -> set[str | None]:
        """Groups whose first gather and last reduction have no compute beside them: the root's, and those of an
        embedding that is a group of its own.
        """
        first = next((block for block in self.blocks if block is not None), None)
        return {None} if first in self.workload.blocks else {None, first}

    @cached_property
    def _trains(self) -> bool:
        return self.workload.stage == "fit"


def running_sums(blocks: list[str | None], size: Callable[[str], int]) -> list[int]:
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
