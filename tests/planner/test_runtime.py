import dataclasses

import pytest
from planner.builders import MIB, MODEL, hardware, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.runtime import step_time


def test_terms_by_hand():
    time = step_time(workload(), Plan(), hardware(1))
    saved = 4 * 64 * MIB + 32 * MIB
    assert time.terms["forward"] == pytest.approx(5e9 / 40e9 + saved / 10e9)
    assert time.terms["backward"] == pytest.approx(2 * time.terms["forward"])
    assert time.terms["optimizer step"] == pytest.approx(10 * MODEL / 10e9)
    assert time.step_seconds == pytest.approx(sum(time.terms.values()))


def test_cuda_hides_communication_and_cpu_does_not():
    plan = Plan(dp_shard=2)
    cpu, cuda = (step_time(workload(), plan, hardware(2, kind=kind)) for kind in ("cpu", "cuda"))
    assert cpu.hidden_seconds == 0
    assert 0 < cuda.hidden_seconds <= cuda.terms["forward"] + cuda.terms["backward"]


def test_without_rates():
    with pytest.raises(ValueError, match="no measured rates"):
        step_time(workload(), Plan(), dataclasses.replace(hardware(1), rates=None))
