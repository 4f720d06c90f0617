import dataclasses

import pytest
from planner.builders import MIB, hardware, parameter, step, workload

from lightning_largescale.hardware import Link
from lightning_largescale.plan import Plan
from lightning_largescale.planner.costs import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from lightning_largescale.planner.runtime import step_time

LINK = Link(latency_seconds=1.0, bandwidth=100.0)
MODEL = 8 * MIB + 4 * 16 * MIB


def test_rings_by_hand():
    assert all_gather_seconds(200, 4, LINK) == 3 * (1 + 2)
    assert reduce_scatter_seconds(200, 4, LINK) == 3 * (1 + 2)
    assert all_reduce_seconds(800, 4, LINK) == 6 * (1 + 2)
    assert all_gather_seconds(200, 1, LINK) == all_reduce_seconds(200, 1, LINK) == 0


def test_terms_by_hand():
    time = step_time(workload(), Plan(), hardware(1))
    saved = 4 * 64 * MIB + 32 * MIB
    assert time.terms["forward"] == pytest.approx(5e9 / 40e9 + saved / 10e9)
    assert time.terms["backward"] == pytest.approx(2 * time.terms["forward"])
    assert time.terms["optimizer step"] == pytest.approx(10 * MODEL / 10e9)
    assert time.step_seconds == pytest.approx(sum(time.terms.values()))


def test_what_is_cheap_runs_again_without_the_products():
    segments = [
        dataclasses.replace(one, product_bytes=16 * MIB, moved_product_bytes=24 * MIB) if one.block else one
        for one in step().segments
    ]
    work = workload(steps={"32-true": dataclasses.replace(step(), segments=tuple(segments))})
    time = step_time(work, Plan(activation_checkpointing="full", checkpointed_operations="cheap"), hardware(1))
    assert time.terms["recomputation"] == pytest.approx(4 * (64 - 24) * MIB / 10e9)


def test_recomputation_is_the_blocks_forward_again():
    plain, again = (
        step_time(workload(), Plan(activation_checkpointing=mode), hardware(1)) for mode in ("none", "full")
    )
    assert again.step_seconds - plain.step_seconds == pytest.approx(4e9 / 40e9 + 4 * 64 * MIB / 10e9)


def test_zero3_gathers_blocks_twice_and_zero2_once():
    two, three = (
        step_time(workload(), Plan(dp_shard=2, reshard_after_forward=again), hardware(2)).terms["all-gather"]
        for again in (False, True)
    )
    assert three - two == pytest.approx(4 * (1e-4 + 8 * MIB / 1e9))


def test_ranks_tell_one_another_what_they_do():
    told = {
        branches: step_time(workload(branches=branches), Plan(dp_shard=4), hardware(4)).terms["agreement"]
        for branches in (False, True)
    }
    # At the end of the forward and of the backward; and before the gathers of a pass and the reductions of five groups.
    assert told[False] == pytest.approx(2 * 2 * 1e-4)
    assert told[True] == pytest.approx((2 + 5 * 3) * 2 * 1e-4)
    assert "agreement" not in step_time(workload(branches=True), Plan(dp_replicate=2), hardware(2)).terms


def test_accumulation_reduces_once():
    one, four = (
        step_time(workload(), Plan(dp_replicate=2), hardware(2), accumulate_grad_batches=count) for count in (1, 4)
    )
    assert four.terms["all-reduce"] == one.terms["all-reduce"]
    assert four.terms["forward"] == pytest.approx(4 * one.terms["forward"])


def test_cuda_hides_communication_and_cpu_does_not():
    plan = Plan(dp_shard=2)
    cpu, cuda = (step_time(workload(), plan, hardware(2, kind=kind)) for kind in ("cpu", "cuda"))
    assert cpu.hidden_seconds == 0
    assert 0 < cuda.hidden_seconds <= cuda.terms["forward"] + cuda.terms["backward"]


def test_reductions_hide_under_the_last_backward_only():
    slow = Link(latency_seconds=0, bandwidth=1e7)
    machine = hardware(2, kind="cuda")
    machine = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, all_reduce=slow))
    for count in (1, 4):
        time = step_time(workload(), Plan(dp_replicate=2), machine, accumulate_grad_batches=count)
        assert time.terms["all-reduce"] > time.terms["backward"]
        assert time.hidden_seconds == pytest.approx(time.terms["backward"] / count)


def test_each_pass_hides_its_own_gathers():
    slow = Link(latency_seconds=0, bandwidth=1e7)
    machine = hardware(2, kind="cuda")
    machine = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, all_gather=slow))
    two, three = (
        step_time(workload(), Plan(dp_shard=2, reshard_after_forward=again), machine, accumulate_grad_batches=3)
        for again in (False, True)
    )
    reductions = 4 * (1e-4 + 8 * MIB / 1e9)  # the root's is the last
    assert two.hidden_seconds == pytest.approx(two.terms["forward"] + reductions)
    assert three.hidden_seconds == pytest.approx(three.terms["forward"] + three.terms["backward"])


def test_slow_bf16_is_slow():
    work = workload(precisions=("32-true", "bf16-mixed"))
    fp32, bf16 = (step_time(work, Plan(precision=name), hardware(1)).step_seconds for name in work.steps)
    assert bf16 > 5 * fp32


def test_without_rates():
    with pytest.raises(ValueError, match="no measured rates"):
        step_time(workload(), Plan(), dataclasses.replace(hardware(1), rates=None))


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


@pytest.mark.parametrize("plan", [{"dp_replicate": 4}, {"dp_shard": 4}])
def test_rows_of_tables_travel_once_each_way(plan):
    table = parameter("users.weight", None, rows=1000, columns=16)
    # A batch of 400 ids, of rows of 64 bytes.
    work = workload(parameters=(*workload().parameters, table), batch_bytes=3200)
    plan = Plan(**plan, row_sharded_embeddings=("users",))
    terms = step_time(work, plan, hardware(4), accumulate_grad_batches=2).terms
    hop, ids, rows = 3 * 1e-4, 3 * 800 / 1e9, 3 * 6400 / 1e9
    assert terms["table exchange"] == pytest.approx(2 * (3 * hop + ids + rows) + (2 * hop + ids + rows) + 3 * hop)
    dense = step_time(workload(), dataclasses.replace(plan, row_sharded_embeddings=()), hardware(4)).terms
    for name in ("all-gather", "reduce-scatter", "all-reduce"):
        assert terms.get(name, 0) == pytest.approx(dense.get(name, 0) * (2 if name == "all-gather" else 1))
    stays = step_time(work, Plan(row_sharded_embeddings=("users",)), hardware(1)).terms
    assert "table exchange" not in stays
