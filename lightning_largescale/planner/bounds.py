"""Lower bound of a layout's step time if some techniques are to make it fit, without solving for amounts.

The plan without the techniques is too large at one moment. It is known how many bytes each technique can take off that
moment, and how long a byte takes to move. The cheapest bytes that close the gap are a lower bound of what has to move,
and a step lasts at least as long as its slowest channel.

Source: Dantzig 1957, "Discrete-Variable Extremum Problems" (the relaxed knapsack, filled by value for size).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_largescale.hardware import Hardware, Rates
from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import MemoryEstimate, allocator_share
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.spread import RECOMPUTATION
from lightning_largescale.techniques.activation_checkpoint.price import again_seconds
from lightning_largescale.workload import Workload

# Bisections, until the shares of the bytes are known to less than a thousandth.
_HALVINGS = 12


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
    again_byte_seconds: float = 0.0,
) -> float | None:
    """Return a lower bound of the step seconds of `plan` with `techniques`; None if they cannot make it fit.

    Args:
        workload: the traced step.
        plan: a plan that offloads nothing.
        memory: the peak memory of `plan`.
        step_seconds: the step seconds of `plan`.
        techniques: any of "release", "optimizer", "parameters", and one of `OF_BLOCKS`.
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
    if share > allocator_share(_under(plan, techniques, workload.blocks, hardware.kind), hardware.kind):
        # The fragmentation may go away as well.
        share, lacking = 0.0, lacking - memory.terms.get("allocator", 0)
    costs = _costs(_removable(workload, plan, memory.terms, share, techniques, accumulate, hardware.kind), hardware)
    if not techniques & {*RECOMPUTATION}:
        seconds = _filled(costs, lacking)
        return None if seconds is None else max(step_seconds, seconds)
    # Recomputation lengthens the compute, offload the transfers: bisect for the shares at which both last as long.
    low, high = 0.0, memory.terms.get("activations", 0) * (1 + share)
    # Each freed byte also frees its share of the fragmentation.
    again_byte_seconds /= 1 + share
    if _filled(costs, lacking - high) is None:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        seconds = _filled(costs, lacking - middle)
        if seconds is None or seconds > step_seconds + middle * again_byte_seconds:
            low = middle
        else:
            high = middle
    return max(step_seconds + low * again_byte_seconds, _filled(costs, lacking - high) or 0.0)


def least_again(sizes: Sizes, rates: Rates) -> float:
    """Return the least seconds of recomputing a block for each byte of activations that this frees.

    Args:
        sizes: the sizes of a plan under which all blocks recompute.
        rates: the rates of the hardware.
    """
    shares = [
        again_seconds(sizes, segment, rates) / saving
        for segment in sizes.step.segments
        if sizes.recomputes(segment) and (saving := sizes.saving(segment))
    ]
    return min(shares, default=0.0)


def _under(plan: Plan, techniques: frozenset[str], blocks: Sequence[str], kind: str) -> Plan:
    """Return `plan` with `techniques`, without amounts."""
    tier = "nvme" if kind == "cpu" else "cpu"
    fields: dict[str, Any] = {f"offload_{name}": tier for name in ("parameters", "optimizer") if name in techniques}
    fields["release_gradients"] = "release" in techniques
    if "activations" in techniques:
        fields["offload_activations"] = tier
    if techniques & {*RECOMPUTATION}:
        fields |= {"activation_checkpointing": "selective", "checkpointed_blocks": tuple(blocks)}
    return dataclasses.replace(plan, **fields)


def _costs(removable: list[tuple[float, float, float]], hardware: Hardware) -> list[tuple[float, float]]:
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


def _removable(
    workload: Workload,
    plan: Plan,
    terms: Mapping[str, int],
    share: float,
    techniques: frozenset[str],
    accumulate: int,
    kind: str,
) -> list[tuple[float, float, float]]:
    """Return what the techniques can take off the worst moment: (bytes, reads of each in a step, writes of each)."""
    holes = 1 + share
    gradients = terms.get("gradients", 0) * holes
    found: list[tuple[float, float, float]] = [(terms.get("optimizer temporaries", 0) * holes, 0.0, 0.0)]
    if "release" in techniques:
        found.append((gradients, 0.0, 0.0))
    if "optimizer" in techniques or (kind == "cuda" and "parameters" in techniques):
        # On CUDA the host may step on the state: then parameters come back instead, unless they are offloaded too.
        # The state of offloaded parameters is itself offloaded.
        copies = 1.0 if kind == "cpu" else 0.0 if "parameters" in techniques else _parameters_of_state(workload)
        found.append((terms.get("optimizer state", 0), min(1.0, copies), 1.0))
    if "activations" in techniques:
        found.append((terms.get("activations", 0) * holes, accumulate / holes, accumulate / holes))
    if "parameters" in techniques:
        fit = workload.stage == "fit"
        fetched = accumulate * (2.0 if fit and plan.reshard_after_forward else 1.0)
        trained = fit and all(parameter.trainable and parameter.used for parameter in workload.parameters)
        # Gradients are offloaded with their parameters; a group's bytes then double.
        also = 0.0 if "release" in techniques else gradients
        size = terms.get("parameters", 0) + also
        each = 1 + (holes if also else 0.0)
        # On CUDA the host steps on them.
        paged = 1.0 if trained and kind == "cpu" else 0.0
        found.append((size, (fetched + paged) / each, paged / each))
    return found


def _parameters_of_state(workload: Workload) -> float:
    """Return the smallest ratio of parameter bytes to optimizer-state bytes over all parameters with state."""
    state = {name: size for needs in workload.optimizers for name, size in needs.state_bytes.items() if size}
    return min((one.bytes / state[one.name] for one in workload.parameters if one.name in state), default=0.0)


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
