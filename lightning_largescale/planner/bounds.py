"""Lower bound of a layout's step time if some remedies are to make it fit, without solving for amounts.

The plan without the remedies is too large at one moment. It is known how many bytes each remedy can take off that
moment, and how long a byte takes to move. The cheapest bytes that close the gap are a lower bound of what has to move,
and a step lasts at least as long as its slowest channel.

Source: Dantzig 1957, "Discrete-Variable Extremum Problems" (the relaxed knapsack, filled by value for size).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from lightning_largescale.planner.peak_memory import MemoryEstimate, allocator_share
from lightning_largescale.planner.remedy import Removable, WorstMoment
from lightning_largescale.planner.spread import REMEDIES, in_unit, recomputes

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Workload

# Bisections, until the shares of the bytes are known to less than a thousandth.
_HALVINGS = 12


def least_seconds(
    workload: Workload,
    plan: Plan,
    memory: MemoryEstimate,
    step_seconds: float,
    remedies: frozenset[str],
    *,
    hardware: Hardware,
    budget_bytes: int,
    accumulate: int = 1,
    built: bool = True,
    again_byte_seconds: float = 0.0,
) -> float | None:
    """Return a lower bound of the step seconds of `plan` with `remedies`; None if they cannot make it fit.

    Args:
        workload: the traced step.
        plan: a plan that offloads nothing.
        memory: the peak memory of `plan`.
        step_seconds: the step seconds of `plan`.
        remedies: names of remedies, of which at most one has an amount in blocks.
        hardware: the hardware, with rates of the tiers.
        budget_bytes: bytes that one rank may hold on its device tier.
        accumulate: micro-batches in a step.
        built: as for `peak_memory`.
        again_byte_seconds: the least seconds of recomputation for each byte it frees.

    Source: the module's docstring.
    """
    if memory.moment == "setup" and built and hardware.kind == "cpu":
        return None
    share = allocator_share(plan, hardware.kind)
    lacking = float(memory.peak_bytes - budget_bytes)
    if share > allocator_share(_under(plan, remedies, workload, hardware.kind), hardware.kind):
        # The fragmentation may go away as well.
        share, lacking = 0.0, lacking - memory.terms.get("allocator", 0)
    worst = WorstMoment(
        workload=workload,
        plan=plan,
        kind=hardware.kind,
        accumulate=accumulate,
        terms=memory.terms,
        holes=1 + share,
        moves_groups=bool(in_unit(remedies, "groups")),
        frees_gradients=any(REMEDIES[name].frees_gradients for name in remedies),
    )
    costs = _costs(_removable(worst, remedies), hardware)
    if not recomputes(remedies):
        seconds = _filled(costs, lacking)
        return None if seconds is None else max(step_seconds, seconds)
    # Recomputation lengthens the compute, offload the transfers.
    high = memory.terms.get("activations", 0) * (1 + share)
    # Each freed byte also frees its share of the fragmentation.
    again_byte_seconds /= 1 + share
    if _filled(costs, lacking - high) is None:
        return None
    return _balanced(costs, lacking, high, step_seconds, again_byte_seconds)


def _balanced(
    costs: list[tuple[float, float]], lacking: float, high: float, step_seconds: float, again_byte_seconds: float
) -> float:
    """Return the seconds of a step whose recomputation, of at most `high` bytes, and transfers last as long."""
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        seconds = _filled(costs, lacking - middle)
        if seconds is None or seconds > step_seconds + middle * again_byte_seconds:
            low = middle
        else:
            high = middle
    return max(step_seconds + low * again_byte_seconds, _filled(costs, lacking - high) or 0.0)


def _under(plan: Plan, remedies: frozenset[str], workload: Workload, kind: str) -> Plan:
    """Return `plan` with `remedies`, without amounts."""
    tier = "nvme" if kind == "cpu" else "cpu"
    fields: dict[str, Any] = {}
    for name in remedies:
        fields |= REMEDIES[name].fields_of_all(workload, tier)
    return dataclasses.replace(plan, **fields)


def _costs(removable: list[Removable], hardware: Hardware) -> list[tuple[float, float]]:
    """Return (seconds per byte, bytes) of each removable term, cheapest first."""
    read, written = _byte_seconds(hardware)
    return sorted(
        (reads * read + writes * written if reads or writes else 0.0, size)
        for size, reads, writes in removable
        if size > 0
    )


def _filled(costs: list[tuple[float, float]], lacking: float) -> float | None:
    """Return the seconds of moving the cheapest `lacking` bytes; None if all of them are too few."""
    seconds = 0.0
    for cost, size in costs:
        taken = min(size, max(0.0, lacking))
        if taken:
            seconds, lacking = seconds + cost * taken, lacking - taken
    return None if lacking > 0 else seconds


def _removable(worst: WorstMoment, remedies: frozenset[str]) -> list[Removable]:
    """Return what the remedies can take off the worst moment."""
    used = [REMEDIES[name] for name in remedies]
    if any(remedy.moves_state(worst.kind) for remedy in used):
        used = [*used, *(one for one in REMEDIES.values() if one.unit == "pages" and one not in used)]
    removable = [remedy.removable(worst) for remedy in used]
    temporaries = worst.terms.get("optimizer temporaries", 0) * worst.holes, 0.0, 0.0
    return [temporaries, *(found for found in removable if found is not None)]


def _byte_seconds(hardware: Hardware) -> tuple[float, float]:
    """Return the seconds per byte read and per byte written.

    On CUDA writes cost nothing: they have a link direction of their own, and may be hidden.
    """
    rates = hardware.rates
    if rates is None:
        return math.inf, math.inf
    if hardware.kind == "cpu":
        read, written = (1 / rate if rate else math.inf for rate in (rates.disk_read, rates.disk_write))
        return read, written
    return (1 / rates.host_to_device.bandwidth if rates.host_to_device else math.inf), 0.0
