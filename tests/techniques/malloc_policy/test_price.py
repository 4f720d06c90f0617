"""The heap, by hand: bytes and seconds."""

import dataclasses

import pytest
from planner.builders import MIB, hardware, peak_of, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.runtime import step_time


def test_holes_by_what_is_done_about_them():
    def share(plan, world):
        found = peak_of(plan, world=world)
        moving = ("activations", "gradients", "gathered parameters", "unreduced gradients", "communication")
        return found.terms["allocator"] / sum(found.terms.get(name, 0) for name in moving)

    assert share(Plan(), 1) == pytest.approx(0.6, rel=1e-3)
    assert share(Plan(dp_replicate=2), 2) == pytest.approx(0.15, rel=1e-3)
    assert share(Plan(activation_checkpointing="full"), 1) == pytest.approx(0.15, rel=1e-3)
    assert share(Plan(dp_shard=2, activation_checkpointing="full"), 2) == pytest.approx(0.05, rel=1e-3)
    assert share(Plan(tp=2), 2) == pytest.approx(0.45, rel=1e-3)


def test_page_faults_by_hand():
    work = workload()
    step = work.steps["32-true"]
    large = [dataclasses.replace(s, forward_large_bytes=MIB, backward_large_bytes=2 * MIB) for s in step.segments]
    work = dataclasses.replace(work, steps={"32-true": dataclasses.replace(step, segments=tuple(large))})
    machine = hardware(2)
    machine = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, fresh_memory=1e9))

    def mapped(plan, on=machine):
        return round(step_time(work, plan, on).terms.get("page faults", 0.0) * 1e9 / MIB)

    made = 3 * len(large)
    # A heap that is watched takes most of it from holes.
    assert mapped(Plan(activation_checkpointing="full")) == round((made + 4) / 4)
    # Every group gathered into two copies, the blocks twice; and the flat copy of all gradients.
    assert mapped(Plan(dp_shard=2)) == made + 2 * 8 + 2 * 2 * 4 * 16 + 8 + 4 * 16
    assert mapped(Plan(dp_shard=2, reshard_after_forward=False)) == made + 2 * (8 + 4 * 16) + 8 + 4 * 16
    assert mapped(Plan()) == mapped(Plan(dp_replicate=2)) == 0
    assert mapped(Plan(dp_shard=2), dataclasses.replace(machine, kind="cuda")) == 0
    assert mapped(Plan(dp_shard=2), hardware(2)) == 0
