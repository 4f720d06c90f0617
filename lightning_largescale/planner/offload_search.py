"""Search for plans that fit by offload: which remedies, and how much of each.

For every layout that does not fit by itself, each set of remedies is solved for its cheapest amounts (`amounts`).
Layouts are visited in the order of their upper bound of speed. The search ends when no remaining layout can beat the
best plan found, so that the result is the best of all.

Source: Land and Doig 1960, "An Automatic Method of Solving Discrete Programming Problems" (branch and bound);
    Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (what can be kept where).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_largescale.planner.amounts import Amounts, Layout
from lightning_largescale.planner.bounds import least_seconds
from lightning_largescale.planner.remedy import UNLIMITED
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.spread import REMEDIES, in_unit
from lightning_largescale.planner.tier_budgets import shortfalls
from lightning_largescale.prices import PRICES

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.report import Estimate
    from lightning_largescale.workload import Workload

# Names of the remedies that move bytes or free them, without recomputation.
OFFLOADS = tuple(name for name, remedy in REMEDIES.items() if not remedy.recomputes)
# Relative difference below which two plans count as equally fast.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Offloading:
    """The inputs of the search for offloading plans.

    Attributes:
        workload: the traced step.
        hardware: the hardware, with rates.
        budgets: bytes of each tier, the device's included; a tier that is missing is not used.
        accumulate: micro-batches in a step.
        may_release: whether gradients may be released early, as nothing needs all of them at once.
        setup: `baseline_bytes` and `built`, as for `peak_memory`.
    """

    workload: Workload
    hardware: Hardware
    budgets: Mapping[str, int]
    accumulate: int
    may_release: bool
    setup: Mapping[str, Any]

    @property
    def has_tiers(self) -> bool:
        """Return whether there is a tier beside the device."""
        return len(self.budgets) > 1

    def remedies(self, plan: Plan) -> list[frozenset[str]]:
        """Return the sets of remedies without recomputation that may be combined with `plan`, smallest sets first."""
        usable = [REMEDIES[name] for name in OFFLOADS if REMEDIES[name].may_help(plan, self)]
        found = itertools.chain.from_iterable(
            itertools.combinations(usable, count) for count in range(1, len(usable) + 1)
        )
        pages = any(remedy.unit == "pages" for remedy in usable)
        # Where state leaves with parameters, more of it may as well.
        return [
            frozenset(remedy.name for remedy in used)
            for used in found
            if not pages
            or not any(remedy.moves_state(self.hardware.kind) for remedy in used)
            or any(remedy.unit == "pages" for remedy in used)
        ]

    def with_recomputation(self, plan: Plan) -> list[tuple[frozenset[str], float]]:
        """Return the sets of remedies in which some blocks recompute instead of offloading their activations.

        Each comes with the least seconds of recomputation for each byte that this frees.
        """
        work, rates = self.workload, self.hardware.rates
        found: list[tuple[frozenset[str], float]] = []
        for name, remedy in REMEDIES.items():
            if not remedy.recomputes or rates is None or not remedy.may_help(plan, self):
                continue
            full = dataclasses.replace(plan, **remedy.fields_of_all(work, ""))
            least = remedy.byte_seconds(Sizes(work, full, self.hardware.kind, self.accumulate), rates)
            if least is not None:
                sets = (names for names in self.remedies(plan) if not in_unit(names, "blocks"))
                found += [(names | {name}, self.accumulate * least) for names in sets]
        return found

    def layouts(self, plan: Plan, *, gathering: bool) -> list[Layout]:
        """Return the layouts of `plan`, with its parameters offloaded if `gathering`, else without."""
        plans = [plan]
        if gathering and not plan.shards:
            options = [price.gathered_options(self.workload) for price in PRICES]
            plans = [
                dataclasses.replace(plan, **{name: value for one in fields for name, value in one.items()})
                for fields in itertools.product(*options)
            ]
        layouts = [self._layout(plan, gathering=gathering) for plan in plans]
        return [layout for layout in layouts if layout.sizes.movable or not gathering]

    def _layout(self, plan: Plan, *, gathering: bool) -> Layout:
        kind = self.hardware.kind
        # A plan that offloads parameters gathers them; in this layout all of them are still resident.
        for remedy in REMEDIES.values() if gathering else ():
            plan = dataclasses.replace(plan, **remedy.fields_of_none("nvme" if kind == "cpu" else "cpu"))
        return Layout(Sizes(self.workload, plan, kind, self.accumulate), self.hardware, self.budgets, **self.setup)


def offloaded_plans(search: Offloading, rows: Sequence[tuple[Plan, Estimate]]) -> Iterator[Plan]:
    """Yield the fastest offloading plan of every layout that may win, from the plans in `rows` that do not fit.

    Args:
        search: the inputs of the search.
        rows: priced plans without offload; the fastest of them that fits bounds the search.

    Source: the module's docstring.
    """
    fitting = [estimate for _, estimate in rows if not shortfalls(estimate.peak_bytes, search.budgets)]
    best, simplest = max((estimate.samples_per_second for estimate in fitting), default=0.0), 0
    layouts: dict[tuple[Plan, bool], list[Layout]] = {}
    for speed, plan, remedies in _bounded(search, rows):
        if speed < best * (1 - _ROUNDING):
            break
        if speed <= best * (1 + _ROUNDING) and len(remedies) >= simplest:
            continue
        gathering = bool(in_unit(remedies, "groups"))
        if (plan, gathering) not in layouts:
            layouts[plan, gathering] = search.layouts(plan, gathering=gathering)
        for layout in layouts[plan, gathering]:
            solved = Amounts(layout, remedies).best()
            if solved is None:
                continue
            found = samples(search, plan) / solved[1]
            if found > best * (1 + _ROUNDING) or (found >= best * (1 - _ROUNDING) and len(remedies) < simplest):
                best, simplest = max(best, found), len(remedies)
            yield solved[0]


def _bounded(search: Offloading, rows: Sequence[tuple[Plan, Estimate]]) -> list[tuple[float, Plan, frozenset[str]]]:
    """Return each plan of `rows` that does not fit, with each set of remedies that may make it fit.

    Sorted by the upper bound of samples per second, highest first; among equals the simplest first.
    """
    found: list[tuple[float, int, Plan, frozenset[str]]] = []
    for order, (plan, estimate) in enumerate(rows):
        fits = estimate.peak_bytes["device"] <= search.budgets["device"]
        if fits or any(price.is_in_part(plan) for price in PRICES):
            continue
        sets = [(names, 0.0) for names in search.remedies(plan)] + search.with_recomputation(plan)
        for remedies, again_byte_seconds in sets:
            seconds = least_seconds(
                search.workload,
                plan,
                estimate.memory,
                estimate.step_seconds,
                remedies,
                hardware=search.hardware,
                budget_bytes=search.budgets["device"],
                accumulate=search.accumulate,
                built=search.setup.get("built", True),
                again_byte_seconds=again_byte_seconds,
            )
            if seconds is not None:
                found.append((samples(search, plan) / seconds, order, plan, remedies))
    found.sort(key=lambda row: (-row[0], len(row[3]), row[1]))
    return [(speed, plan, remedies) for speed, _, plan, remedies in found]


def samples(search: Offloading, plan: Plan) -> float:
    """Return the number of samples in one step of `plan`."""
    return float(search.workload.batch_samples * plan.dp * search.accumulate)


def least_plans(search: Offloading, plans: Collection[Plan]) -> Iterator[Plan]:
    """Yield, for each of `plans`, the variants that offload all that can be: those with the least device memory.

    The last tier is assumed to have room for everything.
    """
    tiers = [tier for tier in ("cpu", "nvme") if tier in search.budgets]
    search = dataclasses.replace(search, budgets={**search.budgets, **dict.fromkeys(tiers[-1:], UNLIMITED)})
    for plan in plans:
        sets = search.remedies(plan)
        # Offloaded parameters have to be gathered again, which may take more memory than it saves.
        for names in (sets[-1:], [names for names in sets if not in_unit(names, "groups")][-1:]):
            for remedies in names:
                for layout in search.layouts(plan, gathering=bool(in_unit(remedies, "groups"))):
                    amounts = Amounts(layout, remedies)
                    least = amounts.plan(amounts.least)
                    if least is not None:
                        yield least
