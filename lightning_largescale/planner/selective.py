"""Which blocks recompute where not all need to: the fewest that bring a step within its budget.

What a block that recomputes saves is saved at every moment between its forward and its backward, so at the moments of
the segments after it. The blocks that can help at a moment can thus help at every moment further into the step, and
the choice can be made one moment after the other, each time of the largest: taking a smaller one instead is never
better for a later moment.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4 (which activations to drop);
    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5 (some layers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lightning_largescale.plan import Plan
from lightning_largescale.planner.sizes import saving
from lightning_largescale.workload import Workload

# A block less that is kept takes its bytes, and the allocator's share of them, off a moment: never more than these
# times its own. What is then still above takes another turn.
_MOST = 2


def fewest_blocks(
    workload: Workload, plan: Plan, first_excess: Callable[[Plan], tuple[int, int] | None]
) -> Plan | None:
    """`plan`, which recomputes nothing and needs too much, with as few blocks recomputed as it takes.

    Args:
        workload: the traced step.
        plan: one without activation checkpointing.
        first_excess: where a plan needs too much: the number of segments before, and the bytes above; None where it
            fits.

    Returns:
        A plan that fits; None where blocks cannot help, or all of them are needed.

    Source: the module's docstring.
    """
    segments = workload.steps[plan.precision].segments
    chosen: set[str] = set()
    current = plan
    while (excess := first_excess(current)) is not None:
        before, over = excess
        gains: dict[str, int] = {}
        for segment in segments[:before]:
            if segment.block is not None and segment.block not in chosen:
                gains[segment.block] = gains.get(segment.block, 0) + saving(segment)
        # Of equal ones the first that is executed: it helps at the most moments.
        order = sorted((block for block in gains if gains[block] > 0), key=lambda block: -gains[block])
        if not order:
            return None
        for block in order:
            chosen.add(block)
            over -= _MOST * gains[block]
            # The first changes more than its own bytes: the allocator is another under a plan that recomputes.
            if over <= 0 or len(chosen) == 1:
                break
        if len(chosen) == len(workload.blocks):
            return None
        names = tuple(block for block in workload.blocks if block in chosen)
        current = dataclasses.replace(plan, activation_checkpointing="selective", checkpointed_blocks=names)
    return current
