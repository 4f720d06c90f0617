import json

import pytest
from planner.builders import workload
from workload.families import GPT, tokens

from lightning_largescale.errors import PlanError
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 3}, "workload.blocks=3 is not accepted; give an array"),
        ({"parameters": 3}, "workload.parameters=3 is not accepted; give an array"),
        ({"parameters": [3]}, r"workload.parameters\[0\]=3 is not accepted; give an object of fields"),
        ({"steps": {"32-true": {}}}, "workload.steps.32-true lacks the field 'precision'"),
        ({"batch_samples": "two"}, "workload.batch_samples='two' is not accepted; give a whole number"),
        ({"divisions": {"two": {}}}, "a key of workload.divisions='two' is not accepted; give a whole number"),
        ({"colour": "red"}, "colour='red' is no field of workload; accepted: name, parameters"),
    ],
)
def test_damaged_fields_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        Workload.from_dict({**workload().to_dict(), **change})


def test_a_missing_field_is_named():
    with pytest.raises(PlanError, match="workload lacks the field 'name'"):
        Workload.from_dict({})
