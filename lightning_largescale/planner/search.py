"""Every admissible plan, priced and ranked: the fastest that fits, and why each other one was not taken.

The space is small enough to enumerate, so the choice is the best under the model of `memory` and `runtime`.

Source: Nagrecha 2023, "Systems for Parallel and Distributed Large-Model Deep Learning Training", section 4 (strategy
    finding); the cost models it ranks by are those of the two modules.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import MATMUL_TYPE, Plan, PlanError
from lightning_largescale.planner.memory import MemoryEstimate, first_excess, peak_memory
from lightning_largescale.planner.report import Candidate, Estimate, Report, plan_fields
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.selective import fewest_blocks
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.units import format_bytes, format_seconds, parse_bytes
from lightning_largescale.workload import Workload

# Values that change the numbers a model trains to; taken only where the user's `allow` names them.
LOSSY = ("bf16-mixed",)
# Of what a device has free, the share that a plan may use unless a budget is given: the rest is for what no model of it
# sees.
BUDGET_SHARE = 0.9
_MORE_DEVICES = (2, 4, 8, 16, 32, 64, 128)
_Option = TypeVar("_Option")


def find_plans(
    workload: Workload,
    hardware: Hardware,
    *,
    allow: Sequence[str] = (),
    memory_budget: int | str | None = None,
    baseline_bytes: int = 0,
    accumulate_grad_batches: int = 1,
    precision: str | None = None,
) -> Report:
    """Price every plan that the devices and the model admit, and rank them.

    Args:
        workload: what one step needs, of one rank's micro-batch.
        hardware: what there is; without rates, a machine that was detected is calibrated now (seconds; cached). With
            several ranks its rates need the links of their collectives.
        allow: values that change numerics and may be taken all the same: "bf16-mixed".
        memory_budget: bytes, or text such as "6GiB", that one rank may hold in all on its device tier; without it, 90%
            of what is free there beside `baseline_bytes`.
        baseline_bytes: what one rank holds there already, the model left out (bytes).
        accumulate_grad_batches: micro-batches between optimizer steps.
        precision: only plans of this precision; without it "32-true" and what `allow` names.

    Raises:
        PlanError: an argument that is not accepted, or a model without parameters. That nothing fits is no error here:
            `best` of the report raises it, with what is missing.

    Source: the module's docstring.
    """
    check_allow(allow)
    _check_count("accumulate_grad_batches", accumulate_grad_batches, least=1)
    _check_count("baseline_bytes", baseline_bytes, least=0)
    _check(workload, hardware, precision)
    if hardware.rates is None:
        hardware = hardware.calibrate()
    _check_links(workload, hardware)
    if precision is not None and not _computes(hardware, precision):
        raise PlanError(f"precision={precision!r} was asked for and {hardware.name} cannot compute it; take '32-true'.")
    if memory_budget is None:
        budget_bytes = int(BUDGET_SHARE * hardware.memory_free_bytes) + baseline_bytes
    else:
        budget_bytes = parse_bytes(memory_budget, name="memory_budget")
    allowed = {precision} if precision else {"32-true", *allow}
    price = _Pricing(baseline_bytes, accumulate_grad_batches)
    rows = [(plan, price.estimate(workload, hardware, plan)) for plan in candidates(workload, hardware)]
    rows += list(price.in_part(workload, hardware, rows, budget_bytes))
    fixed = precision is not None
    report = Report(
        candidates=(*_ranked(rows, budget_bytes, allowed, fixed=fixed), *_impossible(workload, hardware)),
        budget_bytes=budget_bytes,
        hardware=hardware,
        workload=workload,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    advice = _faster(report, fixed=fixed) if report.fits else _would_fit(report, price, allowed, fixed=fixed)
    return dataclasses.replace(report, advice=tuple(advice))


def candidates(workload: Workload, hardware: Hardware) -> Iterator[Plan]:
    """Every plan for the number of devices of `hardware` that the structure of `workload` admits, simplest first.

    Source: the module's docstring.
    """
    usable = [name for name in workload.steps if _computes(hardware, name)]
    for precision in usable:
        for checkpointing in _checkpointing(workload, precision):
            for layout in _layouts(workload, hardware):
                for groups in _groups(workload, layout):
                    yield dataclasses.replace(
                        layout,
                        precision=precision,
                        **checkpointing,
                        **groups,
                    )


def _checkpointing(workload: Workload, precision: str) -> Iterator[dict[str, Any]]:
    """Whether blocks run again, and what of them."""
    yield {}
    if not workload.blocks or workload.stage != "fit":
        return
    yield {"activation_checkpointing": "full"}
    if any(segment.product_bytes for segment in workload.steps[precision].segments if segment.block in workload.blocks):
        yield {"activation_checkpointing": "full", "checkpointed_operations": "cheap"}


def _groups(workload: Workload, layout: Plan) -> Iterator[dict[str, Any]]:
    """What may be gathered by itself, and until when, where `layout` shards."""
    if layout.dp_shard == 1:
        yield {}
        return
    # An evaluation keeps them gathered.
    found = workload.wraps if workload.stage == "fit" else ()
    # What is kept until its backward costs no more by itself, and less memory.
    for reshard, wraps in dict.fromkeys(((True, ()), (True, found), (False, found))):
        yield {"reshard_after_forward": reshard, "wrapped_modules": wraps}


def check_allow(allow: Sequence[str]) -> None:
    """Raise PlanError unless every value of `allow` is one that changes numerics and is known."""
    if isinstance(allow, str) or not isinstance(allow, Collection) or any(name not in LOSSY for name in allow):
        raise PlanError(f"allow={allow!r} is not accepted; give a tuple of {', '.join(map(repr, LOSSY))}, or nothing.")


def _layouts(workload: Workload, hardware: Hardware) -> Iterator[Plan]:
    """Plans whose dp_replicate, dp_shard and tp multiply to the ranks; tp inside a node, where blocks take it."""
    world = hardware.world_size
    divisible = [ranks for ranks, blocks in workload.divisions.items() if any(found.parts for found in blocks.values())]
    for tp in sorted({1, *divisible}):
        if world % tp or tp > hardware.ranks_per_node:
            continue
        for dp_shard in range(1, world // tp + 1):
            if world // tp % dp_shard == 0:
                plan = Plan(dp_replicate=world // tp // dp_shard, dp_shard=dp_shard, tp=tp)
                yield plan
                if workload.stage == "fit" and any(found.sequence for found in workload.divisions.get(tp, {}).values()):
                    yield dataclasses.replace(plan, sequence_parallel=True)


@dataclasses.dataclass(frozen=True)
class _Pricing:
    """What every plan is priced with."""

    baseline_bytes: int
    accumulate: int

    def estimate(self, workload: Workload, hardware: Hardware, plan: Plan) -> Estimate:
        memory = self._memory(workload, hardware, plan)
        time = step_time(workload, plan, hardware, accumulate_grad_batches=self.accumulate)
        return Estimate.of(workload, plan, memory, time, accumulate=self.accumulate)

    def in_part(
        self, workload: Workload, hardware: Hardware, rows: Sequence[tuple[Plan, Estimate]], budget_bytes: int
    ) -> Iterator[tuple[Plan, Estimate]]:
        """Plans between those that recompute nothing and need too much, and those that recompute all."""
        known = {plan for plan, _ in rows}
        for plan, estimate in rows:
            if estimate.memory.peak_bytes <= budget_bytes or plan.activation_checkpointing != "none":
                continue
            for operations in ("all", "cheap"):
                whole = dataclasses.replace(plan, activation_checkpointing="full", checkpointed_operations=operations)
                if whole not in known:
                    continue
                sizes = Sizes(workload, whole, hardware.kind, self.accumulate)
                excess = functools.partial(first_excess, sizes, budget_bytes, baseline_bytes=self.baseline_bytes)
                names = fewest_blocks(workload.blocks, sizes.step.segments, sizes.saving, excess)
                if names is not None:
                    part = dataclasses.replace(whole, activation_checkpointing="selective", checkpointed_blocks=names)
                    yield part, self.estimate(workload, hardware, part)

    def any_fits(self, workload: Workload, hardware: Hardware, precisions: set[str], budget_bytes: int) -> bool:
        """Whether the peak of any plan of these precisions is within the budget."""
        plans = [plan for plan in candidates(workload, hardware) if plan.precision in precisions]
        # Those that save the most first, so that one that fits is found soon.
        plans.sort(key=lambda plan: (plan.activation_checkpointing == "none", -plan.dp_shard * plan.tp))
        return any(self._memory(workload, hardware, plan).peak_bytes <= budget_bytes for plan in plans)

    def _memory(self, workload: Workload, hardware: Hardware, plan: Plan) -> MemoryEstimate:
        return peak_memory(
            workload, plan, hardware, baseline_bytes=self.baseline_bytes, accumulate_grad_batches=self.accumulate
        )


def _check_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{name}={value!r} is not accepted; give a whole number, {least} or more.")


def _check(workload: Workload, hardware: Hardware, precision: str | None) -> None:
    if precision is not None and precision not in workload.steps:
        raise PlanError(f"precision={precision!r} was not traced; accepted: {', '.join(map(repr, workload.steps))}.")
    if not workload.parameters:
        raise PlanError(f"{workload.name} has no parameters, so there is nothing to plan for; give it at least one.")
    if hardware.rates is None and hardware.origin != "detected":
        raise PlanError(
            "the hardware was loaded without measured rates; save it after .calibrate(), or use Hardware.named."
        )


def _check_links(workload: Workload, hardware: Hardware) -> None:
    needed = ("all_gather", "reduce_scatter", "all_reduce") if workload.stage == "fit" else ("all_gather",)
    missing = [name for name in needed if getattr(hardware.rates, name) is None]
    if hardware.world_size > 1 and missing:
        raise PlanError(
            f"the hardware has {hardware.world_size} ranks and no rate of {' or '.join(missing)} between them;"
            f" calibrate it with {hardware.world_size} ranks, as Hardware.detect(ranks_per_node=...).calibrate() does."
        )


def _ranked(rows: list[tuple[Plan, Estimate]], budget_bytes: int, allowed: set[str], *, fixed: bool) -> list[Candidate]:
    """The plans in order: those that fit by time, then those too large by what they lack, then those not allowed."""
    fitting = [row for row in rows if row[0].precision in allowed and row[1].peak_bytes["device"] <= budget_bytes]
    # Ranks of tensor parallelism share their samples, so steps of different plans may be of different numbers.
    fitting.sort(key=lambda row: (-row[1].samples_per_second, row[1].step_seconds, row[1].peak_bytes["device"]))
    large = [row for row in rows if row[0].precision in allowed and row[1].peak_bytes["device"] > budget_bytes]
    large.sort(key=lambda row: row[1].peak_bytes["device"])
    refused = [row for row in rows if row[0].precision not in allowed]
    ranked = [
        Candidate(plan=plan, estimate=estimate, status="fits", reason=_slower(estimate, fitting[0][1]))
        for plan, estimate in fitting
    ]
    if ranked:
        reason = "the only plan that fits" if len(ranked) == 1 else "the fastest of those that fit"
        ranked[0] = dataclasses.replace(ranked[0], status="chosen", reason=reason)
    ranked += [
        Candidate(plan=plan, estimate=estimate, status="too large", reason=_too_large(estimate, budget_bytes))
        for plan, estimate in large
    ]
    ranked += [
        Candidate(plan=plan, estimate=estimate, status="not allowed", reason=_not_allowed(plan, allowed, fixed=fixed))
        for plan, estimate in refused
    ]
    return ranked


def _slower(estimate: Estimate, best: Estimate) -> str:
    """Why a plan that fits lost: how much slower, and the term that makes most of the difference."""
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


def _too_large(estimate: Estimate, budget_bytes: int) -> str:
    short = estimate.peak_bytes["device"] - budget_bytes
    name, size = next(iter(estimate.memory.terms.items()))
    return f"lacks {format_bytes(short)} at the {estimate.memory.moment}, where {name} take {format_bytes(size)}"


def _not_allowed(plan: Plan, allowed: set[str], *, fixed: bool) -> str:
    if plan.precision in LOSSY and not fixed:
        return f"{plan.precision} changes numerics and allow does not name it"
    return f"precision {plan.precision} is not {' or '.join(sorted(allowed))}, which was asked for"


def _impossible(workload: Workload, hardware: Hardware) -> Iterator[Candidate]:
    """Plans that are no candidates at all, and why: one for each reason."""
    if not workload.blocks or workload.stage != "fit":
        reason = f"{workload.name} has no repeated blocks, so nothing to recompute block by block"
        if workload.stage != "fit":
            reason = f"{workload.stage} keeps no activations, so there are none to recompute"
        plan = Plan(activation_checkpointing="full")
        yield Candidate(plan=plan, estimate=None, status="not possible", reason=reason)
    for precision in workload.steps:
        if not _computes(hardware, precision):
            reason = f"{hardware.name} cannot compute matrix products in {MATMUL_TYPE[precision]}"
            yield Candidate(plan=Plan(precision=precision), estimate=None, status="not possible", reason=reason)


def _computes(hardware: Hardware, precision: str) -> bool:
    return hardware.rates is not None and hardware.rates.matmul_rate(MATMUL_TYPE[precision]) is not None


def _faster(report: Report, *, fixed: bool) -> Iterator[str]:
    """What a user could give to go faster, from the candidates that are faster and were not taken."""
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
            yield f"allow=({row.plan.precision!r},) would be {gain}"


def _would_fit(report: Report, price: _Pricing, allowed: set[str], *, fixed: bool) -> Iterator[str]:
    """What would make a plan fit, each tried on its own: numerics, a smaller batch, more devices, more memory."""
    workload, hardware, budget = report.workload, report.hardware, report.budget_bytes
    for name in sorted(set() if fixed else set(LOSSY) - allowed):
        if _least(report, {name}) <= budget:
            yield f"allow {name!r}"
    batches = [workload.batch_samples >> power for power in range(1, workload.batch_samples.bit_length())]
    for samples in _first(
        batches, lambda samples: price.any_fits(workload.with_batch(samples), hardware, allowed, budget)
    ):
        yield f"take micro-batch {samples}"
    machines = [dataclasses.replace(hardware, nodes=hardware.nodes * factor) for factor in _MORE_DEVICES]
    for machine in _first(machines, lambda machine: price.any_fits(workload, machine, allowed, budget)):
        yield f"take {machine.world_size} devices"
    least_bytes = _least(report, allowed)
    if least_bytes < math.inf:
        yield f"give a budget of {format_bytes(least_bytes, up=True)}"


def _first(options: list[_Option], fits: Callable[[_Option], bool]) -> list[_Option]:
    """The first option that fits, none where none does; less of a batch and more devices never need more memory."""
    # The last first: where it does not fit, which takes the longest to find out, no other does.
    if not options or not fits(options[-1]):
        return []
    return [options[bisect.bisect_left(options, True, hi=len(options) - 1, key=fits)]]


def _least(report: Report, precisions: set[str]) -> float:
    """The smallest peak of any plan of these precisions, bytes; infinite where there is none."""
    rows = [row for row in report.candidates if row.plan.precision in precisions]
    return min((row.estimate.peak_bytes["device"] for row in rows if row.estimate), default=math.inf)
