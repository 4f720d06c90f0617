"""A traced step as one rank runs it."""

import dataclasses

import pytest
from planner.builders import MIB, step

from lightning_largescale.planner.as_run import communicated_share, divided_step, without_copies
from lightning_largescale.workload import Divided


def test_copies_are_missing_from_where_they_are_made_on():
    usual = step("bf16-mixed")
    copies = {"saved_copy_bytes": 4 * MIB, "forward_copy_bytes": 3 * MIB, "moved_copy_bytes": MIB}
    first, *others = usual.segments
    run = without_copies(dataclasses.replace(usual, segments=(dataclasses.replace(first, **copies), *others)))
    assert run.segments[0].saved_bytes == first.saved_bytes - 4 * MIB
    assert run.segments[0].forward_peak_bytes == first.forward_peak_bytes - 3 * MIB
    assert run.segments[0].forward_moved_bytes == first.forward_moved_bytes - MIB
    assert run.segments[0].forward_entry_bytes == first.forward_entry_bytes
    assert run.segments[1].forward_entry_bytes == others[0].forward_entry_bytes - 4 * MIB
    assert run.loss_peak_bytes == usual.loss_peak_bytes - 4 * MIB


def test_a_division_saves_its_share_of_a_block():
    run = divided_step(step(), {"blocks.0": Divided(saved_share=0.25, flops_share=0.5)})
    assert run.segments[0].saved_bytes == step().segments[0].saved_bytes // 4
    assert run.segments[0].forward_flops == step().segments[0].forward_flops // 2
    assert run.segments[1].saved_bytes == step().segments[1].saved_bytes


@pytest.mark.parametrize(
    ("precision", "share"), [("32-true", 1.0), ("bf16-mixed", 0.5), ("16-true", 0.5), ("64-true", 1.0)]
)
def test_half_precision_communicates_half(precision, share):
    assert communicated_share(precision) == share
