"""Search for plans that fit by offload: which techniques, and how much of each.

For every layout that does not fit by itself, each set of techniques is solved for its cheapest amounts (`amounts`).
Layouts are visited in the order of their upper bound of speed. The search ends when no remaining layout can beat the
best plan found, so that the result is the best of all.

Source: Land and Doig 1960, "An Automatic Method of Solving Discrete Programming Problems" (branch and bound);
    Rajbhandari et al. 2021, "ZeRO-Infinity", section 5 (what can be kept where).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import Plan
from lightning_largescale.planner.amounts import Amounts, Layout
from lightning_largescale.planner.bounds import least_again, least_seconds
from lightning_largescale.planner.report import Estimate
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.spread import RECOMPUTATION, UNLIMITED
from lightning_largescale.planner.tier_budgets import shortfalls
from lightning_largescale.workload import Workload

TECHNIQUES = ("release", "optimizer", "activations", "parameters")
# Relative difference below which two plans count as equally fast.
_ROUNDING = 1e-9
Row = tuple[Plan, Estimate]


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

    def techniques(self, plan: Plan) -> list[frozenset[str]]:
        """Return the sets of techniques that may be combined with `plan`, smallest sets first."""
        work = self.workload
        fit, tiers = work.stage == "fit", len(self.budgets) > 1
        replicas = plan.dp_replicate > 1 and not plan.shards
        may = {
            "release": self.may_release
            and fit
            and self.accumulate == 1
            and len(work.optimizers) == 1
            and plan.precision != "16-mixed"
            and not replicas,
            "optimizer": tiers and fit and any(any(needs.state_bytes.values()) for needs in work.optimizers),
            "activations": tiers and fit and bool(work.blocks),
            "parameters": tiers and bool(work.blocks) and not work.whole,
        }
        usable = [name for name in TECHNIQUES if may[name]]
        sets = (itertools.combinations(usable, count) for count in range(1, len(usable) + 1))
        found = [frozenset(names) for names in itertools.chain.from_iterable(sets)]
        # On CUDA the state of offloaded parameters is offloaded too.
        both = {"parameters", "optimizer"} if self.hardware.kind == "cuda" and may["optimizer"] else set()
        return [names for names in found if "parameters" not in names or both <= names]

    def with_recomputation(self, plan: Plan) -> list[tuple[frozenset[str], float]]:
        """Return the sets of techniques in which some blocks recompute instead of offloading their activations.

        Each comes with the least seconds of recomputation for each byte that this frees.
        """
        work, rates = self.workload, self.hardware.rates
        if plan.activation_checkpointing != "none" or work.stage != "fit" or len(work.blocks) < 2 or rates is None:
            return []
        found: list[tuple[frozenset[str], float]] = []
        for name, operations in RECOMPUTATION.items():
            full = dataclasses.replace(plan, activation_checkpointing="full", checkpointed_operations=operations)
            sizes = Sizes(work, full, self.hardware.kind, self.accumulate)
            if operations == "cheap" and not any(map(sizes.kept, sizes.step.segments)):
                continue
            least = least_again(sizes, rates)
            sets = (names for names in self.techniques(plan) if "activations" not in names)
            found += [(names | {name}, self.accumulate * least) for names in sets]
        return found

    def layouts(self, plan: Plan, *, gathering: bool) -> list[Layout]:
        """Return the layouts of `plan`, with its parameters offloaded if `gathering`, else without."""
        plans = [plan]
        if gathering and not plan.shards:
            wraps = self.workload.wraps if self.workload.stage == "fit" else ()
            plans = [dataclasses.replace(plan, wrapped_modules=names) for names in dict.fromkeys(((), wraps))]
        layouts = [self._layout(plan, gathering=gathering) for plan in plans]
        return [layout for layout in layouts if layout.sizes.movable or not gathering]

    def _layout(self, plan: Plan, *, gathering: bool) -> Layout:
        kind = self.hardware.kind
        tier = ("nvme" if kind == "cpu" else "cpu") if gathering else None
        # A plan that offloads parameters gathers them; in this layout all of them are still resident.
        given = dataclasses.replace(plan, offload_parameters=tier, resident_parameter_bytes=UNLIMITED if tier else None)
        sizes = Sizes(self.workload, given, kind, self.accumulate)
        return Layout(sizes, self.hardware, self.budgets, **self.setup)


def offloaded_plans(search: Offloading, rows: Sequence[Row]) -> Iterator[Plan]:
    """Yield the fastest offloading plan of every layout that may win, from the plans in `rows` that do not fit.

    Args:
        search: the inputs of the search.
        rows: priced plans without offload; the fastest of them that fits bounds the search.

    Source: the module's docstring.
    """
    fitting = [estimate for _, estimate in rows if not shortfalls(estimate.peak_bytes, search.budgets)]
    best, simplest = max((estimate.samples_per_second for estimate in fitting), default=0.0), 0
    layouts: dict[tuple[Plan, bool], list[Layout]] = {}
    for speed, plan, techniques in _bounded(search, rows):
        if speed < best * (1 - _ROUNDING):
            break
        if speed <= best * (1 + _ROUNDING) and len(techniques) >= simplest:
            continue
        gathering = "parameters" in techniques
        if (plan, gathering) not in layouts:
            layouts[plan, gathering] = search.layouts(plan, gathering=gathering)
        for layout in layouts[plan, gathering]:
            solved = Amounts(layout, techniques).best()
            if solved is None:
                continue
            found = samples(search, plan) / solved[1]
            if found > best * (1 + _ROUNDING) or (found >= best * (1 - _ROUNDING) and len(techniques) < simplest):
                best, simplest = max(best, found), len(techniques)
            yield solved[0]


def _bounded(search: Offloading, rows: Sequence[Row]) -> list[tuple[float, Plan, frozenset[str]]]:
    """Return each plan of `rows` that does not fit, with each set of techniques that may make it fit.

    Sorted by the upper bound of samples per second, highest first; among equals the simplest first.
    """
    found: list[tuple[float, int, Plan, frozenset[str]]] = []
    for order, (plan, estimate) in enumerate(rows):
        fits = estimate.peak_bytes["device"] <= search.budgets["device"]
        if fits or plan.activation_checkpointing == "selective":
            continue
        sets = [(names, 0.0) for names in search.techniques(plan)] + search.with_recomputation(plan)
        for techniques, again_byte_seconds in sets:
            seconds = least_seconds(
                search.workload,
                plan,
                estimate.memory,
                estimate.step_seconds,
                techniques,
                hardware=search.hardware,
                budget_bytes=search.budgets["device"],
                accumulate=search.accumulate,
                built=search.setup.get("built", True),
                again_byte_seconds=again_byte_seconds,
            )
            if seconds is not None:
                found.append((samples(search, plan) / seconds, order, plan, techniques))
    found.sort(key=lambda row: (-row[0], len(row[3]), row[1]))
    return [(speed, plan, techniques) for speed, _, plan, techniques in found]


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
        sets = search.techniques(plan)
        # Offloaded parameters have to be gathered again, which may take more memory than it saves.
        for names in (sets[-1:], [names for names in sets if "parameters" not in names][-1:]):
            for techniques in names:
                for layout in search.layouts(plan, gathering="parameters" in techniques):
                    amounts = Amounts(layout, techniques)
                    least = amounts.plan(amounts.least)
                    if least is not None:
                        yield least
