"""A fit that takes more of the device than its plan was predicted to is reported."""

import dataclasses

import pytest
from lightning.pytorch import Trainer
from ranks import quiet
from test_device_memory import Model

import pretend_cuda
from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.planner.peak_memory import MemoryEstimate
from lightning_largescale.planner.report import Report
from pretend_cuda import peaks

pytestmark = [*quiet, pytest.mark.gpu]
MIB = 1 << 20


def test_more_than_the_tolerance_is_too_much():
    estimate = MemoryEstimate(
        moment="setup", terms={"parameters": 100 * MIB, "runtime": 64 * MIB, "allocator": 6 * MIB}, kind="cuda"
    )
    assert peaks.excess(estimate, 103 * MIB) == ""
    assert peaks.excess(estimate, 104 * MIB).startswith(f"memory: {104 * MIB} bytes were allocated at once")
    assert "and 104857600 predicted, at the setup" in peaks.excess(estimate, 120 * MIB)


@pytest.mark.skipif(pretend_cuda.installed() is None, reason="no device is pretended")
@pytest.mark.parametrize("without", [(), ("optimizer state",)])
def test_a_fit_under_an_auto_strategy_is_compared(tmp_path, monkeypatch, without):
    monkeypatch.setenv(pretend_cuda.REPORTS, str(tmp_path / "reports"))
    estimate_of = Report.estimate_of

    def too_little(report, plan):
        found = estimate_of(report, plan)
        terms = {name: size for name, size in found.memory.terms.items() if name not in without}
        return dataclasses.replace(found, memory=dataclasses.replace(found.memory, terms=terms))

    monkeypatch.setattr(Report, "estimate_of", too_little)
    trainer = Trainer(
        strategy=LargeScaleAutoStrategy(),
        accelerator="cuda",
        devices=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model("AdamW"))
    reports = (tmp_path / "reports").read_text() if (tmp_path / "reports").exists() else ""
    assert reports.startswith("memory: ") == bool(without)
