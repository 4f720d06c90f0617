"""Ranking of priced plans, with a reason for each: the fastest plan that fits comes first.

Source: Nagrecha 2023, "Systems for Parallel and Distributed Large-Model Deep Learning Training", section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_largescale.planner.report import Candidate, Estimate
from lightning_largescale.planner.tier_budgets import shortfalls
from lightning_largescale.prices import PRICES
from lightning_largescale.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from lightning_largescale.plan import Plan

# Uses of techniques that change a model's numerics; a plan has them only if the user's `allow` names them.
LOSSY = tuple(name for price in PRICES for name in price.lossy)


def ranked(
    rows: Sequence[tuple[Plan, Estimate]], budgets: Mapping[str, int], allowed: Collection[str], *, fixed: bool
) -> list[Candidate]:
    """Rank the plans: those that fit by time, then those too large by what they lack, then those not allowed.

    Args:
        rows: plans and their estimates.
        budgets: bytes of each tier.
        allowed: names that the user allows.
        fixed: whether the user asked for one of them.

    Source: the module's docstring.
    """
    refused = {plan: why for plan, _ in rows if (why := refusal(plan, allowed, fixed=fixed))}
    priced = [
        (plan, estimate, shortfalls(estimate.peak_bytes, budgets)) for plan, estimate in rows if plan not in refused
    ]
    fitting = [(plan, estimate) for plan, estimate, short in priced if not short]
    # Tensor-parallel ranks share their samples, so the steps of different plans may have different global batches.
    fitting.sort(key=_order)
    large = [row for row in priced if row[2]]
    large.sort(key=lambda row: (sum(row[2].values()), row[1].peak_bytes["device"]))
    ranked = [
        Candidate(plan=plan, estimate=estimate, status="fits", reason=_slower(estimate, fitting[0][1]))
        for plan, estimate in fitting
    ]
    if ranked:
        reason = "the only plan that fits" if len(ranked) == 1 else "the fastest of those that fit"
        ranked[0] = dataclasses.replace(ranked[0], status="chosen", reason=reason)
    ranked += [
        Candidate(plan=plan, estimate=estimate, status="too large", reason=_too_large(estimate, short))
        for plan, estimate, short in large
    ]
    ranked += [
        Candidate(plan=plan, estimate=estimate, status="not allowed", reason=refused[plan])
        for plan, estimate in rows
        if plan in refused
    ]
    return ranked


def refusal(plan: Plan, allowed: Collection[str], *, fixed: bool) -> str:
    """Return why the user has not allowed `plan`; empty if they have.

    Args:
        plan: the plan.
        allowed: names that the user allows.
        fixed: whether the user asked for one of them.
    """
    return next(filter(None, (price.refusal(plan, allowed, fixed=fixed) for price in PRICES)), "")


def _order(row: tuple[Plan, Estimate]) -> tuple[float, int, float, int]:
    plan, estimate = row
    # Plans whose speeds differ by rounding alone count as equally fast.
    speed = float(f"{estimate.samples_per_second:.9g}")
    return -speed, plan.last_resorts, estimate.step_seconds, estimate.peak_bytes["device"]


def _slower(estimate: Estimate, best: Estimate) -> str:
    """Return why a plan that fits lost: how much slower it is, and the term that makes most of the difference."""
    ratio = best.samples_per_second / estimate.samples_per_second if estimate.samples_per_second else math.inf
    if ratio <= 1 or not math.isfinite(ratio):
        return (
            "as fast, and needs more memory" if estimate.peak_bytes["device"] > best.peak_bytes["device"] else "as fast"
        )
    if not math.isclose(ratio, estimate.step_seconds / best.step_seconds, rel_tol=1e-3):
        samples = "fewer" if estimate.step_seconds < ratio * best.step_seconds else "more"
        return f"{ratio:.2f} times the time a sample, of which its steps have {samples}"
    growth = {name: seconds - best.time.terms.get(name, 0.0) for name, seconds in estimate.time.terms.items()}
    term = max(growth, key=lambda name: growth[name])
    return f"{ratio:.2f} times the step time, {format_seconds(growth[term])} more of {term}"


def _too_large(estimate: Estimate, short: Mapping[str, float]) -> str:
    words = [f"lacks {format_bytes(size)} on {tier}" for tier, size in short.items() if tier != "device"]
    if "device" in short:
        name, size = next(iter(estimate.memory.terms.items()))
        where = f"at the {estimate.memory.moment}, where {name} take {format_bytes(size)}"
        words.insert(0, f"lacks {format_bytes(short['device'])} {where}")
    return ", and ".join(words)
