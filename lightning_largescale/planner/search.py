"""Search over all admissible plans, priced and ranked: the fastest that fits, and why each other plan lost.

The space is small enough to enumerate, so the choice is the best under the models of `peak_memory` and `runtime`.

Source: Nagrecha 2023, "Systems for Parallel and Distributed Large-Model Deep Learning Training", section 4 (strategy
    finding); the cost models it ranks by are those of the two modules.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.planner.advice import faster, would_fit
from lightning_largescale.planner.offload_search import Offloading, least_plans, offloaded_plans
from lightning_largescale.planner.peak_memory import MemoryEstimate, first_excess, peak_memory
from lightning_largescale.planner.ranking import LOSSY, ranked, refusal
from lightning_largescale.planner.report import Candidate, Estimate, Report
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.tier_budgets import shortfalls, tier_budgets
from lightning_largescale.prices import PRICES
from lightning_largescale.units import parse_bytes

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.workload import Workload

# Share of a device's free memory that a plan may use unless a budget is given; the rest is for what the memory model
# does not see.
BUDGET_SHARE = 0.9
# For advice, the number of most memory-saving plans that are tried with all that can be offloaded.
_ASKED = 8


def find_plans(
    workload: Workload,
    hardware: Hardware,
    *,
    allow: Sequence[str] = (),
    memory_budget: int | str | None = None,
    baseline_bytes: int = 0,
    accumulate_grad_batches: int = 1,
    precision: str | None = None,
    may_release: bool = False,
    built: bool = True,
) -> Report:
    """Price and rank every plan that the devices and the model admit.

    Args:
        workload: the traced step, of one rank's micro-batch.
        hardware: the hardware; a detected machine without rates is calibrated now (seconds; cached). With several ranks
            its rates need the links of their collectives.
        allow: precisions that change numerics and may be used all the same: "bf16-mixed".
        memory_budget: bytes, or text such as "6GiB", that one rank may hold in total on its device tier, on CUDA
            without the context; None: 90% of the free bytes there plus `baseline_bytes`.
        baseline_bytes: bytes that one rank holds there already, without the model.
        accumulate_grad_batches: micro-batches between optimizer steps.
        precision: only plans of this precision; None: "32-true" and those that `allow` names.
        may_release: whether parameters may be updated as soon as their gradients are complete: there is one optimizer,
            and nothing needs all gradients at once, as clipping by their norm does.
        built: whether the model is materialized already; if not, it is materialized where it is sharded or offloaded.

    Raises:
        PlanError: an argument is not accepted, or the model has no parameters. It is no error here if nothing fits:
            `best` of the report raises that, with what is missing.

    Source: the module's docstring.
    """
    check_allow(allow)
    _check_count("accumulate_grad_batches", accumulate_grad_batches, least=1)
    _check_count("baseline_bytes", baseline_bytes, least=0)
    _check(workload, hardware, precision)
    if hardware.rates is None:
        hardware = hardware.calibrate()
    _check_links(workload, hardware)
    plans = [*candidates(workload, hardware)]
    allowed = {precision} if precision else {"32-true", *allow}
    fixed = precision is not None
    if fixed and all(refusal(plan, allowed, fixed=fixed) for plan in plans):
        raise PlanError(f"precision={precision!r} was asked for and {hardware.name} cannot compute it; take '32-true'.")
    budget_bytes = int(BUDGET_SHARE * hardware.memory_free_bytes) + baseline_bytes
    if memory_budget is not None:
        budget_bytes = parse_bytes(memory_budget, name="memory_budget")
    pricing = _Pricing(baseline_bytes, accumulate_grad_batches, may_release, built)
    rows = [(plan, pricing.estimate(workload, hardware, plan)) for plan in plans]
    rows += list(pricing.in_part(workload, hardware, rows, budget_bytes))
    rows += list(pricing.elsewhere(workload, hardware, rows, budget_bytes, allowed))
    budgets = {"device": budget_bytes, **tier_budgets(hardware)}
    report = Report(
        candidates=(*ranked(rows, budgets, allowed, fixed=fixed), *_impossible(workload, hardware)),
        budget_bytes=budget_bytes,
        hardware=hardware,
        workload=workload,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    any_fits = functools.partial(pricing.any_fits, allowed=allowed, budget_bytes=budget_bytes)
    advice = faster(report, fixed=fixed) if report.fits else would_fit(report, any_fits, allowed, fixed=fixed)
    return dataclasses.replace(report, advice=tuple(advice))


def candidates(workload: Workload, hardware: Hardware) -> Iterator[Plan]:
    """Yield every plan for the devices of `hardware` that the structure of `workload` admits, simplest first.

    Source: the module's docstring.
    """
    plans = [Plan()]
    for price in PRICES:
        plans = [replace(plan, **fields) for plan in plans for fields in price.options(workload, hardware, plan)]
    for price in PRICES:
        plans = [replace(plan, **fields) for plan in plans for fields in price.rank_options(workload, hardware, plan)]
    for price in PRICES:
        plans = [replace(plan, **fields) for plan in plans for fields in price.options_on_ranks(workload, plan)]
    return iter(plans)


def check_allow(allow: Sequence[str]) -> None:
    """Raise PlanError unless every value of `allow` is a known precision that changes numerics."""
    if isinstance(allow, str) or not isinstance(allow, Collection) or any(name not in LOSSY for name in allow):
        raise PlanError(f"allow={allow!r} is not accepted; give a tuple of {', '.join(map(repr, LOSSY))}, or nothing.")


@dataclasses.dataclass(frozen=True)
class _Pricing:
    """The inputs that are the same for the pricing of every plan."""

    baseline_bytes: int
    accumulate: int
    may_release: bool
    built: bool

    def estimate(self, workload: Workload, hardware: Hardware, plan: Plan) -> Estimate:
        memory = self._memory(workload, hardware, plan)
        time = step_time(workload, plan, hardware, accumulate_grad_batches=self.accumulate)
        return Estimate.of(workload, plan, memory, time, accumulate=self.accumulate)

    def in_part(
        self, workload: Workload, hardware: Hardware, rows: Sequence[tuple[Plan, Estimate]], budget_bytes: int
    ) -> Iterator[tuple[Plan, Estimate]]:
        """Yield plans that use a technique just as much as makes those fit that do not."""

        def sizes_of(plan: Plan) -> Sizes:
            return Sizes(workload, plan, hardware.kind, self.accumulate)

        def excess(sizes: Sizes, recomputed: frozenset[str]) -> tuple[int, int] | None:
            return first_excess(sizes, budget_bytes, recomputed, **self._setup)

        for plan, estimate in rows:
            if estimate.memory.peak_bytes > budget_bytes:
                for price in PRICES:
                    for part in price.in_part(workload, plan, sizes_of, excess):
                        yield part, self.estimate(workload, hardware, part)

    def elsewhere(
        self,
        workload: Workload,
        hardware: Hardware,
        rows: Sequence[tuple[Plan, Estimate]],
        budget_bytes: int,
        allowed: Collection[str],
    ) -> Iterator[tuple[Plan, Estimate]]:
        """Yield plans that offload, or release gradients, because they do not fit without.

        If none of these fits either, yield the nearest of the plans that offload all that can be.
        """
        search = self._offloading(workload, hardware, budget_bytes)
        rows = [row for row in rows if not refusal(row[0], allowed, fixed=False)]
        found = [(plan, self.estimate(workload, hardware, plan)) for plan in offloaded_plans(search, rows)]
        yield from found
        if found or any(estimate.peak_bytes["device"] <= budget_bytes for _, estimate in rows):
            return
        most_saving = min((plan for plan, _ in rows), key=_saves_least, default=Plan())
        alike = [plan for plan, _ in rows if _saves_least(plan)[0] == _saves_least(most_saving)[0]]
        least = [(plan, self._memory(workload, hardware, plan)) for plan in least_plans(search, alike)]
        for plan, _ in sorted(least, key=lambda row: row[1].peak_bytes)[:1]:
            yield plan, self.estimate(workload, hardware, plan)

    def any_fits(self, workload: Workload, hardware: Hardware, *, allowed: Collection[str], budget_bytes: int) -> bool:
        """Return whether any plan that the user allows fits the budgets of all tiers."""
        plans = [plan for plan in candidates(workload, hardware) if not refusal(plan, allowed, fixed=False)]
        # The most memory-saving plans first, so that one that fits is found soon.
        plans.sort(key=_saves_least)
        if any(self._memory(workload, hardware, plan).peak_bytes <= budget_bytes for plan in plans):
            return True
        search = self._offloading(workload, hardware, budget_bytes)
        for plan in least_plans(search, plans[:_ASKED]):
            memory = self._memory(workload, hardware, plan)
            if not shortfalls({"device": memory.peak_bytes, **memory.elsewhere}, search.budgets):
                return True
        return False

    def _offloading(self, workload: Workload, hardware: Hardware, budget_bytes: int) -> Offloading:
        return Offloading(
            workload=workload,
            hardware=hardware,
            budgets={"device": budget_bytes, **tier_budgets(hardware)},
            accumulate=self.accumulate,
            may_release=self.may_release,
            setup=self._setup,
        )

    @property
    def _setup(self) -> dict[str, Any]:
        return {"baseline_bytes": self.baseline_bytes, "built": self.built}

    def _memory(self, workload: Workload, hardware: Hardware, plan: Plan) -> MemoryEstimate:
        return peak_memory(workload, plan, hardware, accumulate_grad_batches=self.accumulate, **self._setup)


def _saves_least(plan: Plan) -> tuple[int, int]:
    """Return a sort key that mostly puts the plans with the least memory first."""
    return sum(price.thrift(plan) for price in PRICES), -plan.ranks_per_replica


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


def _impossible(workload: Workload, hardware: Hardware) -> Iterator[Candidate]:
    """Yield one impossible plan for each reason why a kind of plan is ruled out."""
    for price in PRICES:
        for fields, reason in price.impossible(workload, hardware):
            yield Candidate(plan=Plan(**fields), estimate=None, status="not possible", reason=reason)
