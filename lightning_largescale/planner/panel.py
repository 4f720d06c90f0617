"""Output for the user: one panel at setup, and one line after fit that compares predictions with measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_largescale.console import Bars
from lightning_largescale.hardware.disks import nvme_disk
from lightning_largescale.planner.report import Estimate, Report, plan_fields
from lightning_largescale.planner.transfers import CHANNELS
from lightning_largescale.prices import PRICES
from lightning_largescale.units import format_bytes, format_flops, format_seconds

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.workload import Workload

_BAR_WIDTH = 24
_BUDGET_WIDTH = 54
_MATMUL_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def setup_panel(report: Report) -> Panel:
    """Return the panel of a report with a best plan: hardware, model, plan, predictions, runner-up and advice."""
    estimate = report.best_estimate
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("hardware", Text(hardware_words(report.hardware)))
    table.add_row("model", Text(model_words(report.workload)))
    table.add_row("plan", Text(f"{report.best.describe()}  [{plan_fields(report.best)}]"))
    for price in PRICES:
        for title, words in price.panel_rows(report.workload, report.best):
            table.add_row(title, Text(words))
    table.add_row("peak memory", memory_bars(estimate, report.budget_bytes))
    for tier, size in estimate.peak_bytes.items():
        if tier != "device":
            disk = nvme_disk(report.hardware.disks) if tier == "nvme" else None
            where = f", in {disk.path}" if disk is not None else ""
            table.add_row(f"kept on {tier}", Text(kept_words(size, report.budgets.get(tier)) + where))
    table.add_row("step time", Text(time_words(report, estimate)))
    runner_up = report.runner_up
    if runner_up is not None:
        table.add_row("runner-up", Text(f"{runner_up.plan.describe()}: {runner_up.reason}"))
    else:
        table.add_row("runner-up", "none: no other plan is admissible on this hardware")
    table.add_row("to go faster", Text("; ".join(report.advice) or "no plan of this release would"))
    for note in report.workload.approximate:
        table.add_row("approximate", Text(note))
    return Panel(table, title="lightning_largescale", title_align="left", expand=False)


def after_fit(estimate: Estimate, peak_bytes: int | None, step_seconds: float | None) -> str:
    """Return one line: predicted and measured peak and step time, and the signed error of each prediction.

    Args:
        estimate: the estimate of the plan that ran.
        peak_bytes: the peak measured by `hardware.usage.peak_bytes`; None if it cannot measure.
        step_seconds: the measured step time; None if not measured.
    """
    peak = _against(estimate.memory.measured_bytes, peak_bytes, format_bytes)
    step = _against(estimate.step_seconds, step_seconds, format_seconds)
    of = " of tensors" if estimate.memory.kind == "cuda" else ""
    return f"lightning_largescale: peak memory{of} {peak}; step time {step}"


def hardware_words(hardware: Hardware) -> str:
    """The machine in a line: `"2 x cpu (AMD EPYC), 11.5 GiB free a rank; fp32 21.0 GFLOP/s, all-reduce 0.80 GiB/s"`."""
    where = f" on {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    free = format_bytes(hardware.memory_free_bytes)
    words = f"{hardware.world_size} x {hardware.kind} ({hardware.name}){where}, {free} free a rank"
    if hardware.rates is None:
        return words
    rates = [f"{_MATMUL_NAMES.get(name, name)} {format_flops(rate)}" for name, rate in hardware.rates.matmul.items()]
    if hardware.rates.all_reduce is not None:
        rates.append(f"all-reduce {format_bytes(hardware.rates.all_reduce.bandwidth)}/s")
    return f"{words}; {', '.join(rates)}"


def model_words(workload: Workload) -> str:
    """Return the model in a line: parameters, trainable share, bytes by dtype."""
    total = workload.parameter_bytes
    share = 100.0 * workload.trainable_bytes / total if total else 0.0
    dtypes: dict[str, int] = {}
    for parameter in workload.parameters:
        dtypes[parameter.dtype] = dtypes.get(parameter.dtype, 0) + parameter.bytes
    sizes = ", ".join(f"{format_bytes(size)} {name}" for name, size in dtypes.items())
    blocks = f"; {len(workload.blocks)} blocks" if workload.blocks else "; no repeated blocks"
    return f"{workload.name}, {_count(workload.numel)} parameters, {share:.0f}% trainable; {sizes}{blocks}"


def memory_bars(estimate: Estimate, budget_bytes: int) -> RenderableType:
    """Return the terms of the peak as bars against the budget."""
    peak = estimate.peak_bytes["device"]
    share = min(1.0, peak / budget_bytes)
    beside = " beside CUDA's context" if estimate.memory.kind == "cuda" else ""
    head = Text(
        f"{format_bytes(peak)} of {format_bytes(budget_bytes)} a rank ({100 * peak / budget_bytes:.0f}%){beside},"
        f" at the {estimate.memory.moment}",
    )
    filled = round(_BUDGET_WIDTH * share)
    of_budget = Bars(filled, "bold cyan", _BUDGET_WIDTH - filled)
    bars = Table.grid(padding=(0, 1))
    bars.add_column(no_wrap=True)
    bars.add_column(justify="right", no_wrap=True)
    bars.add_column(no_wrap=True)
    for name, size in _largest(estimate.memory.terms):
        filled = max(1, round(_BAR_WIDTH * size / max(peak, 1)))
        bars.add_row(name, format_bytes(size), Bars(filled, "cyan"))
    return Group(head, of_budget, bars)


def kept_words(size: int, budget_bytes: int | None) -> str:
    """Return the bytes kept in a tier, and its budget: `"14.5 GiB of 80.0 GiB a rank"`."""
    return format_bytes(size) + ("" if budget_bytes is None else f" of {format_bytes(budget_bytes)} a rank")


def time_words(report: Report, estimate: Estimate) -> str:
    """Return the step in a line: seconds, samples per second, the largest terms and all transfers between tiers."""
    rows = list(estimate.time.terms.items())
    rows = rows[:4] + [row for row in rows[4:] if row[0] in CHANNELS]
    terms = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in rows)
    hidden = f", {format_seconds(estimate.time.hidden_seconds)} hidden" if estimate.time.hidden_seconds else ""
    samples = report.workload.batch_samples * report.best.dp * report.accumulate_grad_batches
    ranks = report.best.world_size // report.best.dp
    shared = f", not {samples * ranks}, since {ranks} ranks compute the same samples"
    return (
        f"{format_seconds(estimate.step_seconds)} for a global batch of {samples}{shared if ranks > 1 else ''}"
        f" ({estimate.samples_per_second:.3g} samples/s): {terms}{hidden}"
    )


def _largest(terms: Mapping[str, int], shown: int = 6) -> list[tuple[str, int]]:
    rows = list(terms.items())
    if len(rows) <= shown:
        return rows
    return [*rows[: shown - 1], ("other", sum(size for _, size in rows[shown - 1 :]))]


def _against(predicted: float, measured: float | None, write: Callable[[float], str]) -> str:
    if measured is None or measured <= 0:
        return f"predicted {write(predicted)}, not measured"
    return f"predicted {write(predicted)}, measured {write(measured)} ({100 * (predicted / measured - 1):+.1f}%)"


def _count(number: int) -> str:
    for scale, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)
