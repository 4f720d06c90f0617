"""Tensor parallelism in the planner, by hand: bytes, seconds, links, candidates and what is said of them."""

import dataclasses
import json

import pytest
from planner.builders import MIB, hardware, parameter, step, workload
from planner.test_report import shown

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.planner.costs import all_gather_seconds, all_reduce_seconds
from lightning_largescale.planner.panel import setup_panel
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.search import candidates, find_plans
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.techniques.fully_shard.price import shard_links
from lightning_largescale.techniques.replicate.price import replica_link
from lightning_largescale.techniques.tensor_parallel.price import (
    communicated_share,
    divided_step,
    division_words,
    tensor_link,
    tensor_seconds,
)
from lightning_largescale.tiers import shard_bytes
from lightning_largescale.workload import Divided
from lightning_largescale.workload.divisions import check_division, share_divided
from lightning_largescale.workload.parts import Part

SHARING = Divided(saved_share=0.25, flops_share=0.5, forward_halves=(4 * MIB,) * 5, backward_halves=(4 * MIB,) * 7)
FOUND = Divided(
    parts={"up": Part(0, (2048,)), "down": Part(1, (1024,))},
    whole={"norm": "it meets no product"},
    saved_share=0.5,
    flops_share=0.5,
    forward_reduced=(4 * MIB, 4 * MIB),
    backward_reduced=(4 * MIB, 2 * MIB),
    sequence=SHARING,
)


def divided(**changes):
    work = workload(**changes)
    return dataclasses.replace(work, divisions={2: dict.fromkeys(work.blocks, FOUND)})


def test_bytes_of_a_rank():
    one = parameter("up", "blocks.0", rows=2048)
    assert shard_bytes(one.shape, one.bytes, 1, 2, 0) == one.bytes // 2
    assert shard_bytes(one.shape, one.bytes, 4, 2, 0) == shard_bytes(one.shape, one.bytes, 4, 2, 1) == one.bytes // 8
    assert shard_bytes(one.shape, one.bytes, 4, 2) == one.bytes // 4
    # Of 5 rows a rank has 3, of these 2 and 1; columns are divided before rows.
    assert shard_bytes((6, 4), 6 * 16, 2, 2, 0) == 2 * 16
    sizes = Sizes(divided(), Plan(tp=2), "cpu")
    # The embedding of 8 MiB is whole, and half of four blocks of 16 MiB.
    assert sizes.parameters == (8 + 4 * 8) * MIB
    assert sizes.optimizer_state == 2 * sizes.parameters
    assert sizes.gathered("blocks.0") == 8 * MIB
    both = Sizes(divided(), Plan(tp=2, dp_shard=2), "cpu")
    assert both.parameters == sizes.parameters // 2
    assert both.gathered("blocks.0") == 8 * MIB


def test_activations_of_a_rank():
    work = divided()
    step = work.steps["32-true"]
    ours = divided_step(step, work.divisions[2], 1.0)
    assert [s.saved_bytes for s in ours.segments[:4]] == [s.saved_bytes // 2 for s in step.segments[:4]]
    assert ours.segments[4].saved_bytes == step.segments[4].saved_bytes
    assert ours.segments[4].forward_entry_bytes == step.segments[4].forward_entry_bytes // 2
    assert ours.forward_flops == step.forward_flops - 4 * 10**9 // 2
    for before, after in zip(ours.segments, ours.segments[1:], strict=False):
        assert before.forward_exit_bytes == after.forward_entry_bytes
        assert before.backward_entry_bytes == after.backward_exit_bytes
    assert divided_step(step, {}, 1.0) == step


def test_a_division_saves_its_share_of_a_block():
    run = divided_step(step(), {"blocks.0": Divided(saved_share=0.25, flops_share=0.5)}, 1.0)
    assert run.segments[0].saved_bytes == step().segments[0].saved_bytes // 4
    assert run.segments[0].forward_flops == step().segments[0].forward_flops // 2
    assert run.segments[1].saved_bytes == step().segments[1].saved_bytes


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.0), ("bfloat16", 0.5), ("float16", 0.5), ("float64", 1.0)])
def test_half_precision_communicates_half(dtype, share):
    assert communicated_share(dtype) == share


def test_memory_is_less_and_sharing_the_sequence_takes_less_still():
    work, machine = divided(), hardware(2)
    plain, ours, shared = (
        peak_memory(work, plan, machine).peak_bytes for plan in (Plan(), Plan(tp=2), Plan(tp=2, sequence_parallel=True))
    )
    assert shared < ours < plain


def test_seconds_of_communication():
    work, machine = divided(), hardware(2)
    link = machine.rates.all_reduce
    sizes = Sizes(work, Plan(tp=2), "cpu")
    one_block = sum(all_reduce_seconds(size * MIB, 2, link) for size in (4, 4, 4, 2))
    assert tensor_seconds(sizes, link) == pytest.approx(4 * one_block)
    again = Sizes(work, Plan(tp=2, activation_checkpointing="full"), "cpu")
    twice = one_block + 2 * all_reduce_seconds(4 * MIB, 2, link)
    assert tensor_seconds(again, link) == pytest.approx(4 * twice)
    shared = Sizes(work, Plan(tp=2, sequence_parallel=True), "cpu")
    assert tensor_seconds(shared, link) == pytest.approx(4 * 12 * all_gather_seconds(2 * MIB, 2, link))
    assert tensor_seconds(Sizes(work, Plan(dp_shard=2), "cpu"), link) == 0
    evaluated = dataclasses.replace(work, stage="validate")
    assert tensor_seconds(Sizes(evaluated, Plan(tp=2), "cpu"), link) == pytest.approx(
        4 * 2 * all_reduce_seconds(4 * MIB, 2, link)
    )
    outside = dataclasses.replace(work, divisions={2: {"": FOUND}})
    assert tensor_seconds(Sizes(outside, Plan(tp=2), "cpu"), link) == pytest.approx(one_block)
    assert step_time(work, Plan(tp=2), machine).terms["tensor parallel"] == pytest.approx(4 * one_block)


def test_half_the_bytes_in_half_the_type():
    work, machine = divided(precisions=("32-true", "bf16-mixed")), hardware(2)
    link = tensor_link(2, machine, machine.rates)
    whole, half = (
        tensor_seconds(Sizes(work, Plan(tp=2, precision=precision), "cpu"), link)
        for precision in ("32-true", "bf16-mixed")
    )
    latency = 4 * 4 * 2 * 1e-4
    assert half - latency == pytest.approx((whole - latency) / 2)


def test_links():
    machine = hardware(8, kind="cuda", nodes=4)
    inside = dataclasses.replace(machine.rates.all_reduce, bandwidth=8e9)
    machine = dataclasses.replace(
        machine, rates=dataclasses.replace(machine.rates, node_all_gather=inside, node_reduce_scatter=inside)
    )
    rates = machine.rates
    assert tensor_link(8, machine, rates) == inside
    # Eight groups of shards leave each node together.
    assert shard_links(Plan(tp=8, dp_shard=4), machine, rates)[0].bandwidth == 1e9 / 8
    assert shard_links(Plan(tp=2, dp_shard=4, dp_replicate=4), machine, rates)[0] == inside
    assert replica_link(Plan(tp=2, dp_shard=4, dp_replicate=4), machine, rates).bandwidth == 1e9 / 8
    assert tensor_link(16, machine, rates).bandwidth == 1e9
    assert tensor_link(2, hardware(2), hardware(2).rates) == hardware(2).rates.all_reduce


def test_candidates():
    work = divided()
    found = [plan for plan in candidates(work, hardware(4)) if plan.tp > 1]
    assert {(plan.dp_replicate, plan.dp_shard, plan.tp) for plan in found} == {(2, 1, 2), (1, 2, 2)}
    assert {plan.sequence_parallel for plan in found} == {True, False}
    # Inside a node, where something can be divided.
    assert not [plan for plan in candidates(work, hardware(1, nodes=2)) if plan.tp > 1]
    nothing = dataclasses.replace(work, divisions={2: dict.fromkeys(work.blocks, Divided())})
    assert not [plan for plan in candidates(nothing, hardware(2)) if plan.tp > 1]
    without = dataclasses.replace(FOUND, sequence=None)
    alone = dataclasses.replace(work, divisions={2: dict.fromkeys(work.blocks, without)})
    assert not [plan for plan in candidates(alone, hardware(2)) if plan.sequence_parallel]


def test_plans_are_ranked_by_the_time_a_sample():
    report = find_plans(divided(), hardware(2, fp32=1e9))
    rows = [row for row in report.candidates if row.status in ("chosen", "fits")]
    speeds = [row.estimate.samples_per_second for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    ours = next(row for row in rows if row.plan == Plan(tp=2))
    # A step has half the work, of half the samples.
    assert ours.estimate.step_seconds < report.best_estimate.step_seconds
    assert "times the time a sample, of which its steps have fewer" in ours.reason


def test_what_is_said():
    work = divided()
    assert share_divided(work, 2) == 1
    assert division_words(work, 2) == "88.9% of the parameters divided; whole: blocks.*.norm (it meets no product)"
    report = find_plans(work, hardware(2))
    chosen = next(row for row in report.candidates if row.plan.tp == 2)
    report = dataclasses.replace(report, candidates=(dataclasses.replace(chosen, status="chosen"),))
    words = " ".join(shown(setup_panel(report), 200).replace("│", " ").split())
    assert "tensor parallel 88.9% of the parameters divided; whole: blocks.*.norm (it meets no product)" in words
    assert "for a global batch of 8, not 16, since 2 ranks compute the same samples" in words


def test_a_number_of_ranks_that_divides_little():
    work = divided()
    few = {block: Divided(parts={"up": FOUND.parts["up"]}, whole={"down": "6 heads"}) for block in work.blocks}
    little = dataclasses.replace(work, divisions={4: few})
    with pytest.raises(
        PlanError, match=r"tp=4 leaves 50% of .* whole \(blocks.0.down: 6 heads\); the nearest .* tp=2,"
    ):
        check_division(little, work, 4)
    check_division(work, little, 2)


def test_json_and_other_batches():
    work = divided()
    assert type(work).from_dict(json.loads(json.dumps(work.to_dict()))) == work
    twice = work.with_batch(2 * work.batch_samples).divisions[2]["blocks.0"]
    assert twice.forward_reduced == (8 * MIB, 8 * MIB)
    assert twice.sequence.backward_halves == (8 * MIB,) * 7
