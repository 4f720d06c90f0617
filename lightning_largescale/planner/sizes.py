"""Sizes of one plan, in bytes on one rank, from which the terms of `peak_memory` and `runtime` are computed.

Techniques set the quantities that all share, such as the blocks that are recomputed; here are the sums over them.

Source: Rajbhandari et al. 2020, "ZeRO", section 5; Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_largescale.planner.group_sizes import GroupSizes, running_sums
from lightning_largescale.planner.placement import Placement, outside_tiers
from lightning_largescale.prices import PRICES

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Segment, Workload


class Sizes(GroupSizes):
    """The sizes of one plan, computed once.

    Lists have one item per segment, so that a step is priced in time linear in its segments.

    Attributes:
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
        super().__init__(workload, plan, kind, accumulate_grad_batches)
        self._place()

    def _place(self) -> None:
        self.recomputed: frozenset[str] = frozenset()
        self.keeps_products = self.releases = self.pages_state = self.host_steps = False
        self.reductions = 1
        self.placement = Placement(outside=outside_tiers(self.kind))
        for price in PRICES:
            price.place(self)

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
        for name in ("parameters", "gradients", "optimizer_state", "full_parameters", "trained_bytes", "paging"):
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

    @property
    def saved_elsewhere(self) -> list[int]:
        """Bytes that each block saves in another tier.

        Beside a CUDA device a block's offload begins with the next block's forward, so the last one's stays.
        """
        saved = [size for size in map(self.leaving_of, self.step.segments) if size]
        return saved if self.kind == "cpu" else saved[:-1]

    def saved_by(self, blocks: Collection[str]) -> list[int]:
        """Return the bytes of saved activations that can be offloaded, for each segment of `blocks`."""
        return [self._saved(segment) for segment in self.step.segments if segment.block in blocks]

    def _saved(self, segment: Segment) -> int:
        return segment.saved_bytes - (self.saving(segment) if self.recomputes(segment) else 0)

    @cached_property
    def kept_from_here(self) -> list[int]:
        """For each segment, the rank's gradient bytes, of its own and all later blocks, that stay until the step.

        The list ends with one more item, 0.
        """
        sums = running_sums(self.blocks[::-1], self.kept_gradient)
        return [*sums[::-1], 0]

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
