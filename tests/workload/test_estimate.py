import pytest
from workload.families import GPT, tokens

from lightning_largescale.workload import Workload


def test_no_batch_is_estimated():
    work = Workload.trace(GPT(), None, precisions=("32-true",))
    assert work.approximate[0].startswith("there was no batch to trace with; its needs are estimated")
    assert [s.block for s in work.steps["32-true"].segments] == ["blocks.0", "blocks.1", "blocks.2", None]
    assert work.optimizers[0].class_name == "AdamW"


def test_the_estimate_is_of_the_right_size():
    work, exact = (Workload.trace(GPT(), batch, precisions=("32-true",)) for batch in (tokens(), tokens()))
    module = GPT()
    module.training_step = None
    rough = Workload.trace(module, tokens(), precisions=("32-true",)).steps["32-true"]
    assert rough.forward_flops == pytest.approx(exact.steps["32-true"].forward_flops, rel=0.2)
    assert 0.3 < rough.saved_bytes / work.steps["32-true"].saved_bytes < 3
