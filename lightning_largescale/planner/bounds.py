"""The least that a layout's step can last if some techniques are to make it fit: a bound, found without solving.

The plan without them is too large at one moment. What each technique can take off that moment is known, and how long a
byte of it takes to move; the cheapest bytes that close the gap are a lower bound of what has to be moved, and a step
lasts at least as long as its slowest channel.

Source: Dantzig 1957, "Discrete-Variable Extremum Problems" (the relaxed knapsack, filled by value for size).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import Plan
from lightning_largescale.planner.memory import MemoryEstimate, allocator_share
from lightning_largescale.workload import Workload


def least_seconds(
    workload: Workload,
    plan: Plan,
    memory: MemoryEstimate,
    step_seconds: float,
    techniques: frozenset[str],
    *,
    hardware: Hardware,
    budget_bytes: int,
    accumulate: int = 1,
    built: bool = True,
) -> float | None:
    """Seconds below which no step of `plan` can last that fits because of `techniques`; None where none fits.

    Args:
        workload: what one step needs.
        plan: keeps nothing elsewhere.
        memory: of `plan`.
        step_seconds: of `plan`.
        techniques: of "release", "optimizer", "activations" and "parameters".
        hardware: with rates of the tiers.
        budget_bytes: that one rank may hold on its device tier.
        accumulate: micro-batches in a step.
        built: as for `peak_memory`.

    Source: the module's docstring.
    """
    if memory.moment == "setup" and built and hardware.kind == "cpu":
        return None
    tier = "nvme" if hardware.kind == "cpu" else "cpu"
    other = dataclasses.replace(plan, offload_parameters=tier if "parameters" in techniques else None)
    share = allocator_share(plan, hardware.kind)
    terms = dict(memory.terms)
    lacking = float(memory.peak_bytes - budget_bytes)
    if share > allocator_share(other, hardware.kind):
        # Its holes may close as well.
        share, lacking = 0.0, lacking - terms.get("allocator", 0)
    moved = _removable(workload, plan, terms, share, techniques, accumulate)
    read, written = _byte_seconds(hardware)
    seconds = 0.0
    costs = [
        (reads * read + writes * written if reads or writes else 0.0, size) for size, reads, writes in moved if size > 0
    ]
    for cost, size in sorted(costs):
        taken = min(size, max(0.0, lacking))
        seconds, lacking = seconds + cost * taken, lacking - taken
    return None if lacking > 0 else max(step_seconds, seconds)


def _removable(
    workload: Workload,
    plan: Plan,
    terms: Mapping[str, int],
    share: float,
    techniques: frozenset[str],
    accumulate: int,
) -> list[tuple[float, float, float]]:
    """What can be taken off the worst moment: bytes, and how often each of them is read and written in a step."""
    holes = 1 + share
    gradients = terms.get("gradients", 0) * holes
    found: list[tuple[float, float, float]] = [(terms.get("optimizer temporaries", 0) * holes, 0.0, 0.0)]
    if "release" in techniques:
        found.append((gradients, 0.0, 0.0))
    if "optimizer" in techniques:
        found.append((terms.get("optimizer state", 0), 1.0, 1.0))
    if "activations" in techniques:
        found.append((terms.get("activations", 0) * holes, accumulate / holes, accumulate / holes))
    if "parameters" in techniques:
        fit = workload.stage == "fit"
        fetched = accumulate * (2.0 if fit and plan.reshard_after_forward else 1.0)
        trained = fit and all(parameter.trainable and parameter.used for parameter in workload.parameters)
        # Gradients leave with the parameters they are of; a group's bytes are then as many again.
        also = 0.0 if "release" in techniques else gradients
        size = terms.get("parameters", 0) + also
        each = 1 + (holes if also else 0.0)
        found.append((size, (fetched + trained) / each, (1.0 if trained else 0.0) / each))
    return found


def _byte_seconds(hardware: Hardware) -> tuple[float, float]:
    """Seconds a byte that is read, and that is written: on CUDA what is written has a link of its own, and may hide."""
    rates = hardware.rates
    if rates is None:
        return math.inf, math.inf
    if hardware.kind == "cpu":
        read, written = (1 / rate if rate else math.inf for rate in (rates.disk_read, rates.disk_write))
        return read, written
    return (1 / rates.host_to_device.bandwidth if rates.host_to_device else math.inf), 0.0
