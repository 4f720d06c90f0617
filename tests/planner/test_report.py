import io
import json

import pytest
from planner.builders import MIB, hardware, step, tiered, workload
from rich.console import Console

from lightning_largescale.plan import Plan
from lightning_largescale.planner.panel import after_fit, kept_words, setup_panel
from lightning_largescale.planner.report import peak_words, plan_fields
from lightning_largescale.planner.search import find_plans
from lightning_largescale.units import format_bytes


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


def test_on_cuda_what_tensors_hold_is_compared_and_the_context_is_beside():
    report = find_plans(workload(), hardware(1, kind="cuda"))
    estimate = report.best_estimate
    line = after_fit(estimate, estimate.memory.measured_bytes, None)
    assert "peak memory of tensors predicted" in line
    assert "(+0.0%)" in line
    assert "beside CUDA's context" in " ".join(shown(setup_panel(report), 140).replace("│", " ").split())
    row = report.to_dict()["candidates"][0]
    assert row["measured_as_bytes"] == row["peak_bytes"]["device"] - row["memory_terms"]["allocator"]


def test_the_estimate_of_each_candidate():
    report = find_plans(workload(), hardware(2))
    assert report.estimate_of(report.best) is report.best_estimate
    assert report.estimate_of(Plan(dp_shard=2)) is not None
    assert report.estimate_of(Plan(dp_shard=64)) is None


def kept_elsewhere(**changes):
    work = workload(blocks=16, steps={"32-true": step(blocks=16, saved=8 * MIB, head=4 * MIB)})
    return find_plans(work, tiered(), memory_budget=800 * MIB, may_release=True, built=False, **changes)


def test_each_tier_has_its_line():
    report = kept_elsewhere()
    peak_bytes = report.best_estimate.peak_bytes
    assert set(peak_bytes) == {"device", "nvme"}
    text = " ".join(shown(setup_panel(report), 140).replace("│", " ").split())
    assert f"kept on nvme {format_bytes(peak_bytes['nvme'])} of 100 GiB a rank" in text
    assert "nvme read" in text
    assert "nvme write" in text
    assert "hidden" in text
    assert f"{format_bytes(peak_bytes['nvme'])} nvme" in str(report)
    read = json.loads(report.to_json())
    assert read["candidates"][0]["peak_bytes"] == peak_bytes
    assert read["budgets"] == {"device": 800 * MIB, "nvme": 100 * 1024 * MIB}
    assert Plan.from_dict(read["best"]) == report.best


def test_words_of_tiers():
    assert peak_words({"device": MIB, "nvme": 2 * MIB}) == "1.00 MiB\n2.00 MiB nvme"
    assert kept_words(MIB, None) == "1.00 MiB"
