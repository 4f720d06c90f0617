"""Replicas, by hand: bytes and seconds."""

import dataclasses

import pytest
from planner.builders import MODEL, hardware, peak_of, workload

from lightning_largescale.hardware import Link
from lightning_largescale.plan import Plan
from lightning_largescale.planner.runtime import step_time


def test_replicas_that_accumulate_have_gradients_beside_their_buckets():
    for accumulate, world, beside in ((2, 2, MODEL), (1, 2, 0), (2, 1, 0)):
        estimate = peak_of(Plan(dp_replicate=world), world=world, accumulate_grad_batches=accumulate)
        assert estimate.terms.get("unreduced gradients", 0) == beside
        assert estimate.terms["gradients"] == MODEL


def test_accumulation_reduces_once():
    one, four = (
        step_time(workload(), Plan(dp_replicate=2), hardware(2), accumulate_grad_batches=count) for count in (1, 4)
    )
    assert four.terms["all-reduce"] == one.terms["all-reduce"]
    assert four.terms["forward"] == pytest.approx(4 * one.terms["forward"])


def test_reductions_hide_under_the_last_backward_only():
    slow = Link(latency_seconds=0, bandwidth=1e7)
    machine = hardware(2, kind="cuda")
    machine = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, all_reduce=slow))
    for count in (1, 4):
        time = step_time(workload(), Plan(dp_replicate=2), machine, accumulate_grad_batches=count)
        assert time.terms["all-reduce"] > time.terms["backward"]
        assert time.hidden_seconds == pytest.approx(time.terms["backward"] / count)
