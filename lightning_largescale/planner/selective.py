"""Which blocks recompute where not all need to: the fewest that bring a step within its budget.

What a block that recomputes does not keep is missing at every moment between its forward and its backward, so at those
of the segments after it. A block that helps at a moment thus helps at every moment further into the step, and the
choice is made for one moment after the other, each time of the largest: a smaller one instead is never better for a
later moment. Where running a block again needs more at once than its backward does, which no common model's does,
another choice may be smaller.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4 (which activations to drop);
    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5 (some layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_largescale.workload import Segment

# A block less that is kept takes its bytes, and the allocator's share of them, off a moment: never more than these
# times its own. What is then still above takes another turn.
_MOST = 2


def fewest_blocks(
    blocks: Sequence[str],
    segments: Sequence[Segment],
    saving: Callable[[Segment], int],
    first_excess: Callable[[frozenset[str]], tuple[int, int] | None],
) -> tuple[str, ...] | None:
    """As few of `blocks` as need to be recomputed, at least one.

    Args:
        blocks: names of the repeated blocks.
        segments: of the step, as the plan runs it.
        saving: what recomputing one does not keep, bytes.
        first_excess: where a plan that recomputes these blocks needs too much: the number of segments before, and the
            bytes above; None where it fits.

    Returns:
        Their names, in the order of `blocks`; None where blocks cannot help, or all of them are needed.

    Source: the module's docstring.
    """
    chosen: set[str] = set()
    while (excess := first_excess(frozenset(chosen))) is not None:
        before, over = excess
        gains: dict[str, int] = {}
        for segment in segments[:before]:
            block = segment.block
            if block is not None and block in blocks and block not in chosen:
                gains[block] = gains.get(block, 0) + saving(segment)
        # Of equal ones the first that is executed: it helps at the most moments.
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
    # That it recomputes at all, so that its heap is watched, may be what makes a plan fit.
    return tuple(block for block in blocks if block in (chosen or {blocks[0]}))
