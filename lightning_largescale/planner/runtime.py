"""Step time of a plan: compute, communication and memory traffic as named terms in seconds, less what overlaps.

The terms here are those of any run; techniques add theirs (`Price.seconds`).

Source: Williams et al. 2009, "Roofline", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_largescale.planner.costs import segment_seconds
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.transfers import Away, Passes, transfers
from lightning_largescale.prices import PRICES

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Workload

# On CPU nothing overlaps: gloo runs a collective on the cores that would compute meanwhile, and FSDP2 waits for each.
_OVERLAPS = {"cpu": False, "cuda": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeEstimate:
    """Seconds of one optimizer step on every rank, all micro-batches included.

    Attributes:
        terms: seconds by term, largest first; terms of 0 s are left out.
        hidden_seconds: seconds of communication and of transfers between tiers that overlap with compute; they are
            inside `terms` and subtracted from the sum.
    """

    terms: Mapping[str, float] = field(default_factory=dict)
    hidden_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """The sum of the terms less the hidden seconds."""
        return sum(self.terms.values()) - self.hidden_seconds


def step_time(workload: Workload, plan: Plan, hardware: Hardware, *, accumulate_grad_batches: int = 1) -> TimeEstimate:
    """Return the time of one optimizer step of `workload` under `plan` on `hardware`.

    Args:
        workload: the traced step, of one rank's micro-batch.
        plan: the plan to price.
        hardware: the hardware, with `rates` and the links that the plan communicates over.
        accumulate_grad_batches: micro-batches between optimizer steps.

    Raises:
        ValueError: `hardware` has no rates, or lacks a link.

    Source: the module's docstring.
    """
    rates = hardware.rates
    if rates is None:
        raise ValueError("hardware has no measured rates; give Hardware.detect().calibrate() or Hardware.named(...).")
    return time_of(Sizes(workload, plan, hardware.kind, accumulate_grad_batches), hardware, rates)


def time_of(sizes: Sizes, hardware: Hardware, rates: Rates) -> TimeEstimate:
    """Return `step_time` of the plan of `sizes`."""
    terms, hidden_seconds = beside_transfers(sizes, hardware, rates)
    if sizes.placement.groups or sizes.placement.state or sizes.placement.activations:
        moved = transfers(Away.of(sizes), Passes.of(sizes, terms), rates, sizes.kind)
        terms, hidden_seconds = {**terms, **moved.terms}, hidden_seconds + moved.hidden_seconds
    shown = sorted(((name, seconds) for name, seconds in terms.items() if seconds), key=lambda item: -item[1])
    return TimeEstimate(terms=dict(shown), hidden_seconds=hidden_seconds)


def beside_transfers(sizes: Sizes, hardware: Hardware, rates: Rates) -> tuple[dict[str, float], float]:
    """Return the terms of a step without transfers between tiers, and the seconds of them that are hidden."""
    micro, dtype = sizes.accumulate, sizes.plan.matmul_dtype
    forward, backward = (
        sum(segment_seconds(one, rates, dtype, backward=again) for one in sizes.step.segments)
        for again in (False, True)
    )
    terms = {
        "forward": micro * forward,
        "backward": micro * backward,
        "recomputation": 0.0,
    }
    for price in PRICES:
        terms |= price.seconds(sizes, hardware, rates)
    terms["optimizer step"] = optimizer_seconds(sizes, rates)
    if not _OVERLAPS[hardware.kind]:
        return terms, 0.0
    return terms, _hidden_seconds(sizes, hardware, rates, forward, (terms["backward"] + terms["recomputation"]) / micro)


def optimizer_seconds(sizes: Sizes, rates: Rates) -> float:
    """Return the seconds of `step()` on the rank's shards: the bytes it reads and writes, at memory bandwidth."""
    if sizes.workload.stage != "fit" or not sizes.full_parameters:
        return 0.0
    moved = sum(needs.moved_bytes for needs in sizes.workload.optimizers)
    # Only rows of tables that have a gradient are stepped on.
    stepped = sizes.parameters - sum(map(sizes.local, sizes.ungrouped_parameters)) + sizes.ungrouped_gradients
    return moved * stepped / sizes.full_parameters / rates.memory_bandwidth


def _hidden_seconds(
    sizes: Sizes, hardware: Hardware, rates: Rates, forward_seconds: float, backward_seconds: float
) -> float:
    """Return the seconds of communication that overlap with compute.

    All-gathers overlap with the pass they are for, reductions with the last backward.

    Args:
        sizes: the sizes of the plan.
        hardware: the hardware.
        rates: its rates.
        forward_seconds: compute of one micro-batch's forward.
        backward_seconds: compute of one micro-batch's backward, recomputation included.
    """
    found = [price.overlap(sizes, hardware, rates) for price in PRICES]
    gathers, again, reductions = (float(sum(column)) for column in zip(*found, strict=True))
    micro = sizes.accumulate
    in_forward = micro * min(forward_seconds, max(0.0, gathers))
    in_backward = min(backward_seconds, again + max(0.0, reductions))
    return in_forward + in_backward + (micro - 1) * min(backward_seconds, again)
