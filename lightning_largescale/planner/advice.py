"""Advice to the user: what would make a step faster if a plan fits, and what would make a plan fit if none does.

Source: `docs/planning.md`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, TypeVar

from lightning_largescale.planner.ranking import LOSSY, refusal
from lightning_largescale.planner.report import Report, plan_fields
from lightning_largescale.planner.tier_budgets import shortfalls
from lightning_largescale.prices import PRICES
from lightning_largescale.units import format_bytes

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Workload

_MORE_DEVICES = (2, 4, 8, 16, 32, 64, 128)
_Option = TypeVar("_Option")


def faster(report: Report, *, fixed: bool) -> Iterator[str]:
    """Yield what the user could grant to go faster, from the faster candidates that were not chosen."""
    best = report.best_estimate
    for status in ("too large", "not allowed"):
        rows = [row for row in report.candidates if row.status == status and row.estimate is not None]
        quick = [row for row in rows if row.estimate and row.estimate.step_seconds < 0.99 * best.step_seconds]
        if not quick:
            continue
        row = min(quick, key=lambda row: row.estimate.step_seconds if row.estimate else 0.0)
        if row.estimate is None:
            continue
        gain = f"{best.step_seconds / row.estimate.step_seconds:.2f} times as fast: {plan_fields(row.plan)}"
        short = row.estimate.peak_bytes["device"] - report.budget_bytes
        if status == "too large":
            yield f"{format_bytes(short, up=True)} more memory a rank would be {gain}"
        elif short <= 0 and not fixed:
            yield f"allow={_lossy_in(row.plan)!r} would be {gain}"


def would_fit(
    report: Report, any_fits: Callable[[Workload, Hardware], bool], allowed: Collection[str], *, fixed: bool
) -> Iterator[str]:
    """Yield changes that would each make a plan fit: other numerics, a smaller batch, more devices, more memory."""
    workload, hardware = report.workload, report.hardware
    for name in sorted(set() if fixed else {*LOSSY} - {*allowed}):
        if _least(report, functools.partial(_uses_only, name)) <= report.budget_bytes:
            yield f"allow {name!r}"
    batches = [workload.batch_samples >> power for power in range(1, workload.batch_samples.bit_length())]
    for samples in _first(batches, lambda samples: any_fits(workload.with_batch(samples), hardware)):
        yield f"take micro-batch {samples}"
    machines = [dataclasses.replace(hardware, nodes=hardware.nodes * factor) for factor in _MORE_DEVICES]
    for machine in _first(machines, lambda machine: any_fits(workload, machine)):
        yield f"take {machine.world_size} devices"
    least_bytes = _least(report, lambda plan: not refusal(plan, allowed, fixed=fixed))
    if least_bytes < math.inf:
        yield f"give a budget of {format_bytes(least_bytes, up=True)}"


def _first(options: list[_Option], fits: Callable[[_Option], bool]) -> list[_Option]:
    """Return the first option that fits in a list, or an empty list if none does.

    Bisects: a smaller batch or more devices never need more memory.
    """
    # The last option is tried first: if it does not fit, which takes the longest to find out, no other does.
    if not options or not fits(options[-1]):
        return []
    return [options[bisect.bisect_left(options, True, hi=len(options) - 1, key=fits)]]


def _lossy_in(plan: Plan) -> tuple[str, ...]:
    return tuple(name for price in PRICES for name in price.lossy_in(plan))


def _uses_only(name: str, plan: Plan) -> bool:
    return _lossy_in(plan) == (name,)


def _least(report: Report, counts: Callable[[Plan], bool]) -> float:
    """Return the smallest device peak (bytes) of the plans that count and fit all other tiers.

    Infinite if no plan fits them.
    """
    estimates = [row.estimate for row in report.candidates if row.estimate and counts(row.plan)]
    others = {tier: size for tier, size in report.budgets.items() if tier != "device"}
    enough = {**others, "device": math.inf}
    peaks = [one.peak_bytes for one in estimates if not shortfalls(one.peak_bytes, enough)]
    return min((peak_bytes["device"] for peak_bytes in peaks), default=math.inf)
