"""Selective recomputation: the fewest blocks to recompute that bring a step within its budget.

The activations that a recomputed block does not keep are absent between its forward and its backward, so during all
segments after it. A block that helps at one moment thus helps at every moment further into the step. The choice goes
from moment to moment and takes the largest blocks each time: a smaller block is never better for a later moment. If
recomputing a block needs more memory at once than its backward does, which no common model's does, another choice may
be smaller.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4 (which activations to drop);
    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5 (some layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_largescale.workload import Segment

# Recomputing one more block takes its bytes, and the allocator's share of them, off a moment: never more than this
# multiple of its own bytes. An excess that remains takes another turn.
_MOST = 2


def fewest_blocks(
    blocks: Sequence[str],
    segments: Sequence[Segment],
    saving: Callable[[Segment], int],
    first_excess: Callable[[frozenset[str]], tuple[int, int] | None],
) -> tuple[str, ...] | None:
    """Return the fewest of `blocks` that need to be recomputed, at least one.

    Args:
        blocks: names of the repeated blocks.
        segments: the segments of the step, as the plan runs it.
        saving: returns the bytes that recomputing a segment frees.
        first_excess: returns the first moment at which a plan that recomputes these blocks exceeds the budget, as
            (number of segments before it, bytes above the budget); None if it fits.

    Returns:
        The names in the order of `blocks`; None if blocks cannot help, or all of them are needed.

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
