"""The step that was traced in a precision, as it runs."""

import dataclasses

from planner.builders import MIB, hardware, step, workload
from workload.families import GPT, tokens

from lightning_largescale.plan import Plan
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.techniques.precision.price import without_copies
from lightning_largescale.workload import Workload


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


def test_bf16_gathers_half():
    work = workload(precisions=("32-true", "bf16-mixed"))
    full, half = (Sizes(work, Plan(dp_shard=2, precision=name), "cpu") for name in work.steps)
    assert half.gathered("blocks.0") == full.gathered("blocks.0") // 2


def test_sharded_bf16_makes_no_copies_of_what_it_gathers():
    module, batch = GPT(), tokens(samples=1)
    work = Workload.trace(module, batch, precisions=("bf16-mixed",))
    for block in module.blocks:
        for matrix in (p for p in block.parameters() if p.dim() > 1):
            matrix.data = matrix.data.bfloat16()
    gathered = Workload.trace(module, batch, precisions=("bf16-mixed",)).steps["bf16-mixed"].segments
    replicated, sharded = (
        Sizes(work, Plan(precision="bf16-mixed", **devices), "cpu").step.segments
        for devices in ({"dp_replicate": 2}, {"dp_shard": 2})
    )
    assert replicated == work.steps["bf16-mixed"].segments
    for ours, theirs in zip(sharded, gathered, strict=True):
        for name in (
            "saved_bytes",
            "forward_moved_bytes",
            "forward_entry_bytes",
            "forward_peak_bytes",
            "forward_exit_bytes",
            "backward_entry_bytes",
            "backward_exit_bytes",
        ):
            assert getattr(ours, name) == getattr(theirs, name), (ours.block, name)
        assert ours.backward_peak_bytes >= theirs.backward_peak_bytes


def test_slow_bf16_is_slow():
    work = workload(precisions=("32-true", "bf16-mixed"))
    fp32, bf16 = (step_time(work, Plan(precision=name), hardware(1)).step_seconds for name in work.steps)
    assert bf16 > 5 * fp32
