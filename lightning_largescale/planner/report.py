"""Report: every candidate, its predicted bytes and seconds, and why it won or lost; as a table, text and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lightning_largescale.console import as_text
from lightning_largescale.errors import PlanError
from lightning_largescale.planner.peak_memory import MemoryEstimate
from lightning_largescale.planner.runtime import TimeEstimate
from lightning_largescale.planner.tier_budgets import shortfalls, tier_budgets
from lightning_largescale.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.workload import Workload

_REPORT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The predicted memory and time of one plan.

    Attributes:
        peak_bytes: peak bytes of one rank on its "device", and the bytes it keeps on "cpu" and "nvme", if any. On CUDA
            the device's bytes are those that torch's allocator reserves, with its fragmentation and without the
            context; the staging buffers of pages are on "cpu".
        step_seconds: seconds of one optimizer step, all its micro-batches included.
        samples_per_second: samples per second of all ranks together.
        memory: the terms of the peak.
        time: the terms of the step.
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
        """Return the estimate of `plan` from its memory and time; a step has `accumulate` micro-batches."""
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
    """One plan that was considered.

    Attributes:
        plan: the plan.
        estimate: its estimate; None if it could not be priced.
        status: "chosen", "fits", "too large", "not allowed" or "not possible".
        reason: the reason for the status, in words.
    """

    plan: Plan
    estimate: Estimate | None
    status: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of a search.

    Attributes:
        candidates: every plan considered, best first.
        budget_bytes: total bytes that one rank may hold on its device tier; on CUDA the bytes that torch's allocator
            may reserve, without the context.
        hardware: the hardware planned for, with rates.
        workload: the workload planned for.
        accumulate_grad_batches: micro-batches in a step.
        advice: if a plan fits, changes that would make it faster; else changes that would make one fit.
    """

    candidates: tuple[Candidate, ...]
    budget_bytes: int
    hardware: Hardware
    workload: Workload
    accumulate_grad_batches: int = 1
    advice: tuple[str, ...] = ()

    @property
    def budgets(self) -> dict[str, int]:
        """Bytes that one rank may hold in each usable tier."""
        return {"device": self.budget_bytes, **tier_budgets(self.hardware)}

    @property
    def fits(self) -> bool:
        """Return whether any plan fits."""
        return bool(self.candidates) and self.candidates[0].status == "chosen"

    @property
    def best(self) -> Plan:
        """The chosen plan.

        Raises:
            PlanError: no plan fits; the message has the nearest plan, the bytes it lacks and what would make one fit.
        """
        return self._chosen().plan

    @property
    def best_estimate(self) -> Estimate:
        """The estimate of the best plan; raises as `best` does."""
        estimate = self._chosen().estimate
        if estimate is None:
            raise RuntimeError("a plan was chosen without a price")
        return estimate

    def estimate_of(self, plan: Plan) -> Estimate | None:
        """Return the estimate of `plan`; None if it is no candidate or could not be priced."""
        return next((row.estimate for row in self.candidates if row.plan == plan), None)

    @property
    def runner_up(self) -> Candidate | None:
        """The second-best plan that fits, else the nearest that does not; None if there is no other."""
        return self.candidates[1] if len(self.candidates) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types, without the traced steps."""
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
        """Return `to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __rich__(self) -> Table:
        """Return the candidates as a table, best first."""
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
        """Return the table as text, 120 columns wide, followed by the error message if nothing fits."""
        return as_text(self, width=120).rstrip() + ("" if self.fits else f"\n{self.nothing_fits()}")

    def nothing_fits(self) -> str:
        """Return one sentence: the nearest plan, the bytes it lacks in each tier, and what would make one fit."""
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
    """Return the bytes of each tier, one per line: `"5.80 GiB"`, then `"14.5 GiB nvme"`."""
    lines = [format_bytes(size) + ("" if tier == "device" else f" {tier}") for tier, size in peak_bytes.items()]
    return "\n".join(lines)


def plan_fields(plan: Plan) -> str:
    """Return the non-default fields of `plan` as a user types them: `"dp_shard=2, precision='bf16-mixed'"`."""
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
