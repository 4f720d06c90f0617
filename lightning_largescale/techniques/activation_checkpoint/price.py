"""Price of activation checkpointing: activations that are not kept, and a forward that runs again.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.costs import segment_seconds
from lightning_largescale.planner.price import Fields, Moment, Price, Terms
from lightning_largescale.planner.remedy import Assigned, Remedy

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.offload_search import Offloading
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Segment, Workload


# Recomputing one more block takes its bytes, and the allocator's share of them, off a moment: never more than this
# multiple of its own bytes. An excess that remains takes another turn.
_MOST = 2


class RecomputationRemedy(Remedy):
    """Blocks that recompute some operations instead of having their activations leave the device."""

    unit = "blocks"
    recomputes = True

    def __init__(self, name: str, operations: str) -> None:
        self.name, self._operations = name, operations

    @override
    def may_help(self, plan: Plan, search: Offloading) -> bool:
        fit = search.workload.stage == "fit"
        return plan.activation_checkpointing == "none" and fit and len(search.workload.blocks) > 1

    @override
    def fields(self, sizes: Sizes, assigned: Assigned) -> Fields:
        return {
            "activation_checkpointing": "selective",
            "checkpointed_blocks": assigned.blocks,
            "checkpointed_operations": self._operations,
        }

    @override
    def fields_of_all(self, workload: Workload, tier: str) -> Fields:
        return {"activation_checkpointing": "full", "checkpointed_operations": self._operations}

    @override
    def byte_seconds(self, sizes: Sizes, rates: Rates) -> float | None:
        segments = sizes.step.segments
        if sizes.keeps_products and not any(map(sizes.kept, segments)):
            return None
        recomputed = [(one, sizes.saving(one)) for one in segments if sizes.recomputes(one)]
        return min((_again_seconds(sizes, one, rates) / saving for one, saving in recomputed if saving), default=0.0)


class ActivationCheckpointPrice(Price):
    """Blocks that keep their input and recompute their forward."""

    remedies = (RecomputationRemedy("recomputation", "all"), RecomputationRemedy("cheap recomputation", "cheap"))

    @override
    def options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        yield {}
        yield from _full(workload, plan)

    @override
    def in_part(
        self,
        workload: Workload,
        plan: Plan,
        sizes_of: Callable[[Plan], Sizes],
        first_excess: Callable[[Sizes, frozenset[str]], tuple[int, int] | None],
    ) -> Iterable[Plan]:
        if plan.activation_checkpointing != "none":
            return
        for fields in _full(workload, plan):
            full = dataclasses.replace(plan, **fields)
            sizes = sizes_of(full)
            names = fewest_blocks(workload.blocks, sizes.step.segments, sizes.saving, partial(first_excess, sizes))
            if names is not None:
                yield dataclasses.replace(full, activation_checkpointing="selective", checkpointed_blocks=names)

    @override
    def is_in_part(self, plan: Plan) -> bool:
        return plan.activation_checkpointing == "selective"

    @override
    def impossible(self, workload: Workload, hardware: Hardware) -> Iterable[tuple[Fields, str]]:
        if workload.blocks and workload.stage == "fit":
            return
        reason = f"{workload.name} has no repeated blocks, so nothing to recompute block by block"
        if workload.stage != "fit":
            reason = f"{workload.stage} keeps no activations, so there are none to recompute"
        yield {"activation_checkpointing": "full"}, reason

    @override
    def thrift(self, plan: Plan) -> int:
        again = ("full", "selective", "none").index(plan.activation_checkpointing)
        return 2 * again + (plan.checkpointed_operations == "cheap")

    @override
    def place(self, sizes: Sizes) -> None:
        every = sizes.workload.blocks if sizes.plan.activation_checkpointing == "full" else ()
        sizes.recomputed = frozenset((*every, *(sizes.plan.checkpointed_blocks or ())))
        sizes.keeps_products = sizes.plan.checkpointed_operations == "cheap"

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        if sizes.plan.activation_checkpointing == "none":
            return {}
        # A copy of a block's buffers is kept until its backward.
        buffers = {"buffers": sizes.workload.buffer_bytes}
        if moment != "backward":
            return buffers
        return {**buffers, "activations": [_above(sizes, index) for index in range(len(sizes.blocks))]}

    @override
    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        if sizes.workload.stage != "fit":
            return {}
        segments = filter(sizes.recomputes, sizes.step.segments)
        return {"recomputation": sizes.accumulate * sum(_again_seconds(sizes, one, rates) for one in segments)}

    @override
    def fresh_bytes(self, sizes: Sizes) -> tuple[int, int]:
        segments = filter(sizes.recomputes, sizes.step.segments)
        return sum(_again(sizes, one).forward_large_bytes for one in segments), 0


def _again_seconds(sizes: Sizes, segment: Segment, rates: Rates) -> float:
    """Return the seconds of recomputing `segment` per micro-batch, without products if their results are kept."""
    return segment_seconds(_again(sizes, segment), rates, sizes.plan.matmul_dtype, backward=False)


def fewest_blocks(
    blocks: Sequence[str],
    segments: Sequence[Segment],
    saving: Callable[[Segment], int],
    first_excess: Callable[[frozenset[str]], tuple[int, int] | None],
) -> tuple[str, ...] | None:
    """Return the fewest of `blocks` that need to be recomputed, at least one.

    The activations that a recomputed block does not keep are absent between its forward and its backward, so during all
    segments after it. A block that helps at one moment thus helps at every moment further into the step. The choice
    goes from moment to moment and takes the largest blocks each time: a smaller block is never better for a later
    moment. If recomputing a block needs more memory at once than its backward does, which no common model's does,
    another choice may be smaller.

    Args:
        blocks: names of the repeated blocks.
        segments: the segments of the step, as the plan runs it.
        saving: returns the bytes that recomputing a segment frees.
        first_excess: returns the first moment at which a plan that recomputes these blocks exceeds the budget, as
            (number of segments before it, bytes above the budget); None if it fits.

    Returns:
        The names in the order of `blocks`; None if blocks cannot help, or all of them are needed.

    Source: Chen et al. 2016, section 4 (which activations to drop); Korthikanti et al. 2022, "Reducing Activation
        Recomputation in Large Transformer Models", section 5 (some layers).
    """
    chosen: set[str] = set()
    while (excess := first_excess(frozenset(chosen))) is not None:
        before, over = excess
        gains: dict[str, int] = {}
        for segment in segments[:before]:
            block = segment.block
            if block is not None and block in blocks and block not in chosen:
                gains[block] = gains.get(block, 0) + saving(segment)
        # Among equal blocks the first that is executed comes first: it helps at the most moments.
        order = sorted((block for block in gains if gains[block] > 0), key=lambda block: -gains[block])
        if not order:
            return None
        for block in order:
            chosen.add(block)
            over -= _MOST * gains[block]
            if over <= 0:
                break
    if len(chosen) >= len(blocks):
        return None
    # Recomputing any block at all has the heap watched, which alone may make a plan fit.
    return tuple(block for block in blocks if block in (chosen or {blocks[0]}))


def _full(workload: Workload, plan: Plan) -> Iterable[Fields]:
    """Return the plan fields of each way in which all blocks may recompute."""
    if not workload.blocks or workload.stage != "fit":
        return
    yield {"activation_checkpointing": "full"}
    if any(one.product_bytes for one in workload.steps[plan.precision].segments if one.block in workload.blocks):
        yield {"activation_checkpointing": "full", "checkpointed_operations": "cheap"}


def _again(sizes: Sizes, segment: Segment) -> Segment:
    """Return `segment` as its forward is recomputed: without matrix products if their results are kept."""
    if not sizes.keeps_products:
        return segment
    return dataclasses.replace(
        segment,
        forward_flops=0,
        forward_moved_bytes=segment.forward_moved_bytes - segment.moved_product_bytes,
        forward_large_bytes=max(0, segment.forward_large_bytes - segment.product_bytes),
    )


def _above(sizes: Sizes, index: int) -> int:
    """Return by how many bytes the recomputation of a segment is above the peak of its backward."""
    segment = sizes.step.segments[index]
    if not sizes.recomputes(segment):
        return 0
    # The kept results are live already.
    again = max(0, segment.forward_peak_bytes - segment.forward_entry_bytes - sizes.kept(segment))
    live = segment.backward_entry_bytes - sizes.dropped[index] - sizes.saving(segment) + again
    return max(0, live - sizes.live_in_backward(index))
