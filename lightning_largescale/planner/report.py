"""Report: every candidate, its predicted bytes and seconds, and why it won or fell out; as a table, text and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_largescale.console import as_text
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import MemoryEstimate
from lightning_largescale.planner.runtime import TimeEstimate
from lightning_largescale.planner.tier_budgets import shortfalls, tier_budgets
from lightning_largescale.units import format_bytes, format_seconds
from lightning_largescale.workload import Workload

_REPORT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What one plan is predicted to need.

    Attributes:
        peak_bytes: bytes one rank holds on its "device" at its worst moment, and those it keeps on "cpu" and "nvme",
            where it keeps any. On CUDA the device's are those of torch's allocator, the holes in its segments among
            them and the context not; the buffers that pages are staged in are on "cpu".
        step_seconds: seconds of one optimizer step, all its micro-batches included.
        samples_per_second: samples of all ranks together.
        memory: the terms that make up the peak.
        time: the terms that make up the step.
    """

    peak_bytes: Mapping[str, int]
    step_seconds: float
    samples_per_second: float
    memory: MemoryEstimate
    time: TimeEstimate

    @classmethod
    def of(
        cls, workload: Workload, plan: Plan, memory: MemoryEstimate, time: TimeEstimate, *, accumulate: int = 1
    ) -> Estimate:
        """The estimate of `plan` from its two parts; `accumulate` micro-batches make a step."""
        samples = workload.batch_samples * plan.dp * accumulate
        return cls(
            peak_bytes={"device": memory.peak_bytes, **memory.elsewhere},
            step_seconds=time.step_seconds,
            samples_per_second=samples / time.step_seconds if time.step_seconds else float("inf"),
            memory=memory,
            time=time,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One plan that was looked at.

    Attributes:
        plan: the plan.
        estimate: its price; None where it could not be priced.
        status: "chosen", "fits", "too large", "not allowed" or "not possible".
        reason: why, in words.
    """

    plan: Plan
    estimate: Estimate | None
    status: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of a search.

    Attributes:
        candidates: every plan looked at, best first.
        budget_bytes: what one rank may hold in all on its device tier; on CUDA what torch's allocator may have, beside
            the context.
        hardware: what was planned for, with rates.
        workload: what was planned.
        accumulate_grad_batches: micro-batches in a step.
        advice: when a plan fits, what would make it faster; when none does, what would make one fit.
    """

    candidates: tuple[Candidate, ...]
    budget_bytes: int
    hardware: Hardware
    workload: Workload
    accumulate_grad_batches: int = 1
    advice: tuple[str, ...] = ()

    @property
    def budgets(self) -> dict[str, int]:
        """What one rank may hold in each tier that can be planned with, bytes."""
        return {"device": self.budget_bytes, **tier_budgets(self.hardware)}

    @property
    def fits(self) -> bool:
        """Whether any plan fits."""
        return bool(self.candidates) and self.candidates[0].status == "chosen"

    @property
    def best(self) -> Plan:
        """The plan to take.

        Raises:
            PlanError: no plan fits; the message has the nearest one, the bytes it lacks and what would make one fit.
        """
        return self._chosen().plan

    @property
    def best_estimate(self) -> Estimate:
        """What the best plan is predicted to need; raises as `best` does."""
        estimate = self._chosen().estimate
        if estimate is None:
            raise RuntimeError("a plan was chosen without a price")
        return estimate

    def estimate_of(self, plan: Plan) -> Estimate | None:
        """What `plan` is predicted to need; None where it is no candidate, or could not be priced."""
        return next((row.estimate for row in self.candidates if row.plan == plan), None)

    @property
    def runner_up(self) -> Candidate | None:
        """The next best plan that fits, else the nearest that does not; None when there is no other."""
        return self.candidates[1] if len(self.candidates) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the traced steps, as plain types."""
        return {
            "version": _REPORT_VERSION,
            "best": dataclasses.asdict(self.best) if self.fits else None,
            "budget_bytes": self.budget_bytes,
            "budgets": self.budgets,
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "advice": list(self.advice),
            "approximate": list(self.workload.approximate),
            "candidates": [_candidate_dict(candidate) for candidate in self.candidates],
            "hardware": self.hardware.to_dict(),
            "model": {
                "name": self.workload.name,
                "parameters": self.workload.numel,
                "parameter_bytes": self.workload.parameter_bytes,
                "trainable_bytes": self.workload.trainable_bytes,
                "blocks": list(self.workload.blocks),
                "batch_samples": self.workload.batch_samples,
            },
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __rich__(self) -> Table:
        """The candidates as a table, best first."""
        table = Table(
            title=f"Plans for {self.workload.name}, {format_bytes(self.budget_bytes)} a rank", title_justify="left"
        )
        table.add_column("plan", overflow="fold", ratio=3)
        table.add_column("peak", justify="right", no_wrap=True)
        table.add_column("step", justify="right", no_wrap=True)
        table.add_column("outcome", overflow="fold", ratio=4)
        for row in self.candidates:
            estimate = row.estimate
            table.add_row(
                plan_fields(row.plan),
                peak_words(estimate.peak_bytes) if estimate else "-",
                format_seconds(estimate.step_seconds) if estimate else "-",
                Text(f"{row.status}: {row.reason}"),
                style="bold" if row.status == "chosen" else "" if row.status == "fits" else "dim",
            )
        if self.workload.approximate:
            table.caption = Text("\n".join(f"approximate: {note}" for note in self.workload.approximate))
        return table

    def __str__(self) -> str:
        """The table as text, 120 columns wide, and the error where nothing fits."""
        return as_text(self, width=120).rstrip() + ("" if self.fits else f"\n{self.nothing_fits()}")

    def nothing_fits(self) -> str:
        """One sentence: the nearest plan, the bytes it lacks in each tier, and what would make one fit."""
        large = [row for row in self.candidates if row.status == "too large"]
        if not large or large[0].estimate is None:
            return "no plan is admissible; see the candidates."
        short = shortfalls(large[0].estimate.peak_bytes, self.budgets)
        lacking = ", ".join(f"{format_bytes(size)} on {tier}" for tier, size in short.items())
        return (
            f"no plan fits {format_bytes(self.budget_bytes)} a rank; the nearest ({plan_fields(large[0].plan)}) lacks"
            f" {lacking}: {', or '.join(self.advice)}."
        )

    def _chosen(self) -> Candidate:
        if not self.fits:
            raise PlanError(self.nothing_fits())
        return self.candidates[0]


def peak_words(peak_bytes: Mapping[str, int]) -> str:
    """The bytes of each tier that has any, a line each: `"5.80 GiB"`, then `"14.5 GiB nvme"`."""
    lines = [format_bytes(size) + ("" if tier == "device" else f" {tier}") for tier, size in peak_bytes.items()]
    return "\n".join(lines)


def plan_fields(plan: Plan) -> str:
    """The fields of `plan` that differ from the plain run's, as typed: `"dp_shard=2, precision='bf16-mixed'"`."""
    return ", ".join(f"{name}={_typed(value)}" for name, value in plan.changed_fields().items()) or "Plan()"


def _typed(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 3:
        return f"({value[0]!r}, ..., {value[-1]!r})"
    return repr(value)


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    estimate = candidate.estimate
    row: dict[str, Any] = {
        "plan": dataclasses.asdict(candidate.plan),
        "status": candidate.status,
        "reason": candidate.reason,
    }
    if estimate is not None:
        row |= {
            "peak_bytes": dict(estimate.peak_bytes),
            "measured_as_bytes": estimate.memory.measured_bytes,
            "peak_moment": estimate.memory.moment,
            "memory_terms": dict(estimate.memory.terms),
            "step_seconds": estimate.step_seconds,
            "samples_per_second": estimate.samples_per_second,
            "time_terms": dict(estimate.time.terms),
        }
    return row
