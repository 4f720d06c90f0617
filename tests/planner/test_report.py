import io
import json

import pytest
from planner.builders import MIB, hardware, workload
from rich.console import Console

from lightning_largescale.plan import Plan
from lightning_largescale.planner.panel import after_fit, setup_panel
from lightning_largescale.planner.report import plan_fields
from lightning_largescale.planner.search import find_plans


def shown(renderable, width):
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(renderable)
    return buffer.getvalue()


def test_json_holds_every_candidate():
    report = find_plans(workload(), hardware(2))
    read = json.loads(report.to_json())
    assert read["version"] == 1
    assert Plan.from_dict(read["best"]) == report.best
    assert len(read["candidates"]) == len(report.candidates)
    assert sum(read["candidates"][0]["memory_terms"].values()) == read["candidates"][0]["peak_bytes"]["device"]


def test_text_is_the_table():
    report = find_plans(workload(), hardware(2))
    text = str(report)
    assert "chosen: the fastest of those that fit" in text
    assert all(plan_fields(row.plan).split(",")[0] in text for row in report.candidates)
    assert max(map(len, text.splitlines())) <= 120


def test_many_blocks_are_shown_by_the_first_and_the_last():
    names = tuple(f"blocks.{index}" for index in range(4))
    plan = Plan(activation_checkpointing="selective", checkpointed_blocks=names)
    assert plan_fields(plan).endswith("checkpointed_blocks=('blocks.0', ..., 'blocks.3')")
    few = Plan(activation_checkpointing="selective", checkpointed_blocks=names[:3])
    assert plan_fields(few).endswith("checkpointed_blocks=('blocks.0', 'blocks.1', 'blocks.2')")


def test_text_says_when_nothing_fits():
    assert "no plan fits 1.00 MiB a rank" in str(find_plans(workload(), hardware(2), memory_budget=MIB))


@pytest.mark.parametrize("width", [80, 120])
def test_panel_fits_the_terminal_and_says_it_all(width):
    report = find_plans(workload(approximate=("a reason",)), hardware(2), memory_budget=900 * MIB)
    text = shown(setup_panel(report), width)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.replace("│", " ").split())
    for words in ("hardware", "2 x cpu", "model", "100% trainable", "plan", "peak memory", "step time", "runner-up"):
        assert words in flat
    assert "to go faster" in flat
    assert "a reason" in flat


def test_line_after_fit_signs_its_errors():
    estimate = find_plans(workload(), hardware(1)).best_estimate
    peak, step = estimate.peak_bytes["device"], estimate.step_seconds
    line = after_fit(estimate, int(peak / 1.1), step * 2)
    assert "(+10.0%)" in line
    assert "(-50.0%)" in line
    assert "not measured" in after_fit(estimate, None, None)


def test_the_estimate_of_each_candidate():
    report = find_plans(workload(), hardware(2))
    assert report.estimate_of(report.best) is report.best_estimate
    assert report.estimate_of(Plan(dp_shard=2)) is not None
    assert report.estimate_of(Plan(dp_shard=64)) is None
