"""What a user is told would help does."""

import pytest
from planner.builders import MIB, hardware, step, tiered, workload

from lightning_largescale.errors import PlanError
from lightning_largescale.planner.search import find_plans

BOTH = ("32-true", "bf16-mixed")


def test_advice_when_nothing_fits_is_true():
    work = workload(precisions=BOTH, blocks=6, steps={name: step(name, blocks=6, saved=800 * MIB) for name in BOTH})
    report = find_plans(work, hardware(1), memory_budget=1100 * MIB)
    assert not report.fits
    (batch,) = [line for line in report.advice if line.startswith("take micro-batch")]
    samples = int(batch.split()[-1])
    assert find_plans(work.with_batch(samples), hardware(1), memory_budget=1100 * MIB).fits
    (budget,) = [line for line in report.advice if line.startswith("give a budget of")]
    assert report.nothing_fits().endswith(budget + ".")
    assert find_plans(work, hardware(1), memory_budget=budget.removeprefix("give a budget of ")).fits


def test_advice_where_no_plan_is_allowed():
    report = find_plans(workload(precisions=("bf16-mixed",)), hardware(1))
    assert report.advice == ("allow 'bf16-mixed'",)
    with pytest.raises(PlanError, match="no plan is admissible; see the candidates"):
        _ = report.best


def test_a_precision_that_was_asked_for_is_not_advised_against():
    work = workload(precisions=BOTH)
    report = find_plans(work, hardware(1, bf16=400e9), precision="32-true", allow=("bf16-mixed",))
    assert report.advice == ()
    (reason, *_) = [row.reason for row in report.candidates if row.status == "not allowed"]
    assert reason == "precision bf16-mixed is not 32-true, which was asked for"


def test_advice_counts_what_may_leave():
    # Its states alone are 1.03 GiB.
    work = workload(blocks=16, steps={"32-true": step(blocks=16, saved=256 * MIB)})
    budget = 600 * MIB
    report = find_plans(work, tiered(), memory_budget=budget, built=False, may_release=True)
    assert not report.fits
    (batch,) = [line for line in report.advice if line.startswith("take micro-batch")]
    fewer = work.with_batch(int(batch.split()[-1]))
    assert find_plans(fewer, tiered(), memory_budget=budget, built=False, may_release=True).best.offloads
    (more,) = [line.removeprefix("give a budget of ") for line in report.advice if line.startswith("give a budget")]
    assert find_plans(work, tiered(), memory_budget=more, built=False, may_release=True).fits
