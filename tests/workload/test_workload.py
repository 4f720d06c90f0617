import json

import pytest
from workload.families import GPT, tokens

from lightning_largescale.workload import Segment, Step, Workload
from lightning_largescale.workload.workload import combine_steps


def test_json():
    work = Workload.trace(GPT(), tokens())
    assert Workload.from_dict(json.loads(json.dumps(work.to_dict()))) == work


def test_another_batch_size_scales_what_follows_it():
    work = Workload.trace(GPT(), tokens(4), precisions=("32-true",))
    twice, real = work.with_batch(8), Workload.trace(GPT(), tokens(8), precisions=("32-true",))
    assert (twice.batch_samples, twice.batch_bytes) == (8, real.batch_bytes)
    assert twice.parameters == work.parameters
    one, other = twice.steps["32-true"], real.steps["32-true"]
    assert one.forward_flops == other.forward_flops
    assert one.saved_bytes == pytest.approx(other.saved_bytes, rel=0.02)
    assert one.peak_bytes >= other.peak_bytes


def test_combine_steps():
    def step(live):
        segment = Segment(block="b", forward_flops=2 * live, saved_bytes=live)
        return Step(precision="32-true", segments=(segment,), loss_peak_bytes=live)

    drawn = combine_steps([step(10), step(14)], lambda one, two: one + 3 * (two - one))
    assert drawn == step(22)
    assert combine_steps([step(10)], lambda value: value - 100) == step(0)
    assert (drawn.saved_bytes, drawn.forward_flops, drawn.backward_flops, drawn.peak_bytes) == (22, 44, 0, 0)
