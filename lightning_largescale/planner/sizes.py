"""Sizes of one plan, in bytes on one rank, from which the terms of `peak_memory` and `runtime` are computed.

Techniques set the quantities that all share, such as the ranks that a group is gathered from and the blocks that are
recomputed; here are the sums over them.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_largescale.planner.paging import Paging
from lightning_largescale.planner.placement import Placement, outside_tiers
from lightning_largescale.techniques.prices import PRICES
from lightning_largescale.tiers import shard_bytes

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Parameter, Segment, Step, Workload


class Sizes:
    """The sizes of one plan, in bytes on one rank, computed once.

    Lists have one item per segment, so that a step is priced in time linear in its segments.

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
        recomputed: blocks whose forward runs again in backward.
        keeps_products: whether these keep the results of matrix products.
        releases: whether the gradients of blocks are used and freed in backward.
        reductions: number of gradient reductions in a step.
        pages_state: whether optimizer state is paged.
        host_steps: whether the host steps on offloaded state.
        placement: the tiers of what is offloaded.
    """

    def __init__(self, workload: Workload, plan: Plan, kind: str, accumulate_grad_batches: int = 1) -> None:
        """Create the sizes of `plan` on devices of `kind`."""
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
        self._gradients: dict[tuple[str | None, bool], int] = {}
        for price in PRICES:
            price.lay_out(self)
        grouped = (s if s.block in self.group_names else dataclasses.replace(s, block=None) for s in self.step.segments)
        self.step = dataclasses.replace(self.step, segments=tuple(grouped))
        for price in PRICES:
            self.step = price.run(self, self.step)
        self._place()

    def _place(self) -> None:
        self.recomputed: frozenset[str] = frozenset()
        self.keeps_products = self.releases = self.pages_state = self.host_steps = False
        self.reductions = 1
        self.placement = Placement(outside=outside_tiers(self.kind))
        for price in PRICES:
            price.place(self)

    @cached_property
    def movable(self) -> list[str]:
        """Groups whose parameters can be offloaded, in the module's order: all but the root."""
        return [name for name in self.groups if name is not None]

    def shard(self, block: str | None) -> int:
        """Return the bytes of one group's parameters that the rank keeps between their uses."""
        if block not in self._shards:
            self._shards[block] = sum(map(self.local, self._group(block)))
        return self._shards[block]

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

    def gathered(self, block: str | None) -> int:
        """Return the bytes of one group's unsharded parameters in computation, padding included; None is the root."""
        if block not in self._gathered:
            whole = self.shard(block) * self.gather_ranks
            self._gathered[block] = whole // 2 if self.halves and block in self.workload.blocks else whole
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
        other.recomputed = blocks
        return other

    def placing(self, plan: Plan) -> Sizes:
        """Return the sizes of `plan`, which may differ from this plan in offload and recomputation only.

        All else is shared. `plan` must gather parameters if this plan does.
        """
        other = self._sharing(("dropped", "leaving", "kept_from_here", "passing_gradients"))
        other.plan = plan
        other._place()
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
        return segment.block in self.recomputed

    def kept(self, segment: Segment) -> int:
        """Return the bytes of results of `segment` that its recomputation keeps."""
        return segment.product_bytes if self.keeps_products else 0

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
        return self._saved(segment) if segment.block in self.placement.blocks else 0

    def saved_by(self, blocks: Collection[str]) -> list[int]:
        """Return the bytes of saved activations that can be offloaded, for each segment of `blocks`."""
        return [self._saved(segment) for segment in self.step.segments if segment.block in blocks]

    def _saved(self, segment: Segment) -> int:
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
        return block is not None and (self.releases or block in self.placement.away)

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
    def trained(self) -> list[Parameter]:
        """Parameters that receive a gradient in a step."""
        return [p for p in self.workload.parameters if p.trainable and p.used]

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

    def block_beside(self, index: int, step: int) -> str | None:
        """Return the nearest other block before segment `index` (`step` -1) or after it (1); None if there is none."""
        own, index = self.blocks[index], index + step
        while 0 <= index < len(self.blocks):
            if self.blocks[index] not in (None, own):
                return self.blocks[index]
            index += step
        return None

    def live_in_backward(self, index: int) -> int:
        """Return the bytes of activations and temporaries at the peak of one segment's backward, not recomputed."""
        return max(0, self.step.segments[index].backward_peak_bytes - self.dropped[index])

    @property
    def parameters_here(self) -> int:
        """Bytes of the rank's parameters in the device's memory between their uses."""
        return self.parameters - sum(map(self.shard, self.placement.away))

    @property
    def state_here(self) -> int:
        """Bytes of the rank's optimizer state in the device's memory between steps."""
        return self.optimizer_state - self.placement.state_away if self._trains else 0

    @property
    def beside_no_compute(self) -> set[str | None]:
        """Groups whose first gather and last reduction have no compute beside them: the root's, and those of an
        embedding that is a group of its own.
        """
        first = next((block for block in self.blocks if block is not None), None)
        return {None} if first in self.workload.blocks else {None, first}

    @property
    def fresh_bytes(self) -> tuple[int, int]:
        """Bytes of large tensors that are allocated in each micro-batch, and once a step."""
        made = sum(segment.forward_large_bytes + segment.backward_large_bytes for segment in self.step.segments)
        found = [price.fresh_bytes(self) for price in PRICES]
        return made + sum(each for each, _ in found), sum(once for _, once in found)

    @property
    def staging_bytes(self) -> int:
        """Bytes of a CUDA device's staging buffers in DRAM."""
        return sum(price.staging(self) for price in PRICES)

    def gradients_passing(self, blocks: Iterable[str | None]) -> int:
        """Return the gradient bytes of those of `blocks` whose gradients are used or offloaded as soon as they arrive.

        On CUDA the gradients of offloaded parameters are in DRAM, and do not count.
        """
        in_dram = set(self.placement.groups) if self.kind != "cpu" else set()
        return sum(self.gradient(block, whole=False) for block in {*blocks} - in_dram if self.passes(block))

    def _group(self, block: str | None) -> list[Parameter]:
        return self.groups.get(block, [])


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
