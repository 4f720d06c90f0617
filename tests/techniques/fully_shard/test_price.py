"""Sharding over nodes: the links of the groups of a mesh, and plans that keep to the fast ones."""

import dataclasses

import pytest
from planner.builders import MIB, MODEL, hardware, peak_of, segment, step, workload

from lightning_largescale.hardware import Hardware, Link
from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.search import find_plans
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.techniques.fully_shard.price import shard_links
from lightning_largescale.techniques.replicate.price import replica_link

ACROSS = Link(latency_seconds=1e-4, bandwidth=1e9)
INSIDE = Link(latency_seconds=1e-5, bandwidth=8e9)


def nodes(count, ranks, **links):
    machine = hardware(ranks, kind="cuda", nodes=count)
    return dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, **links))


@pytest.mark.parametrize(
    ("ranks", "plan", "gather_bandwidth", "reduce_bandwidth"),
    [
        (8, Plan(dp_replicate=4, dp_shard=8), 8e9, 1e9 / 8),
        (8, Plan(dp_replicate=8, dp_shard=4), 8e9, 1e9 / 4),
        (8, Plan(dp_replicate=2, dp_shard=16), 1e9, 1e9 / 8),
        (6, Plan(dp_replicate=3, dp_shard=8), 1e9 / 2, 1e9 / 6),  # two groups meet on a node
        (1, Plan(dp_replicate=2, dp_shard=2), 1e9, 1e9),
    ],
)
def test_groups_inside_a_node_and_groups_that_share_its_network(ranks, plan, gather_bandwidth, reduce_bandwidth):
    machine = nodes(4, ranks, node_all_gather=INSIDE, node_reduce_scatter=INSIDE)
    assert [link.bandwidth for link in shard_links(plan, machine, machine.rates)] == [gather_bandwidth] * 2
    assert replica_link(plan, machine, machine.rates).bandwidth == reduce_bandwidth


def test_one_group_of_all_ranks_has_the_network_to_itself():
    machine = nodes(4, 8, node_all_gather=INSIDE)
    assert shard_links(Plan(dp_shard=32), machine, machine.rates)[0] == machine.rates.all_gather
    assert replica_link(Plan(dp_replicate=32), machine, machine.rates) == machine.rates.all_reduce


def test_one_node_and_a_node_that_was_not_measured_alone():
    plan = Plan(dp_replicate=4, dp_shard=8)
    rates = hardware(32).rates
    assert replica_link(plan, hardware(32), rates) == rates.all_reduce
    assert shard_links(plan, nodes(4, 8), rates)[0] == rates.all_gather


def test_hybrid_sharding_on_four_nodes_by_hand():
    """Groups of the root, 8 MiB, and of four blocks, 16 MiB each, on four nodes of eight devices."""
    machine = nodes(4, 8, all_reduce=ACROSS, node_all_gather=INSIDE, node_reduce_scatter=INSIDE)
    terms = step_time(workload(), Plan(dp_replicate=4, dp_shard=8), machine).terms
    root, blocks = (7 * (1e-5 + size / 8 / 8e9) for size in (8 * MIB, 16 * MIB))
    assert terms["all-gather"] == pytest.approx(root + 2 * 4 * blocks)
    assert terms["reduce-scatter"] == pytest.approx(root + 4 * blocks)
    root, blocks = (6 * (1e-4 + size / 8 / 4 / (1e9 / 8)) for size in (8 * MIB, 16 * MIB))
    assert terms["all-reduce"] == pytest.approx(root + 4 * blocks)


def test_accumulating_shards_stay_inside_nodes_whose_network_is_slow():
    """L4 nodes: 12.5 GB/s between, 32 GB/s inside, and parameters are gathered with each of four micro-batches."""
    machine = Hardware.named("8xL4-24GB", nodes=4)
    work = workload(steps={"32-true": step(saved=MIB, head=MIB)})
    across, hybrid = (
        step_time(work, Plan(dp_replicate=32 // size, dp_shard=size), machine, accumulate_grad_batches=4).terms
        for size in (32, 8)
    )
    latency_seconds = (7 * 5.7e-6 + 14e-6) / 8
    assert across["all-gather"] == pytest.approx(4 * 31 * (9 * latency_seconds + 136 * MIB / 32 / 12.5e9))
    assert hybrid["all-gather"] == pytest.approx(4 * 7 * (9 * 5.7e-6 + 136 * MIB / 8 / 32e9))
    # Nothing may leave the devices.
    machine = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, host_to_device=None))
    report = find_plans(work, machine, accumulate_grad_batches=4)
    of_four = min(row.estimate.peak_bytes["device"] for row in report.candidates if row.plan.dp_shard == 4)
    best = find_plans(work, machine, accumulate_grad_batches=4, memory_budget=of_four - 1).best
    assert (best.dp_replicate, best.dp_shard) == (4, 8)


def test_a_link_that_is_missing():
    with pytest.raises(ValueError, match="lacks a link that the plan communicates over; calibrate it with all ranks"):
        step_time(workload(), Plan(dp_replicate=2), nodes(1, 2, all_reduce=None))
    assert step_time(workload(), Plan(dp_shard=2), nodes(1, 2, all_reduce=None)).terms["all-gather"] > 0


def test_ranks_that_may_run_different_blocks_gather_one_more():
    alike, unlike = (peak_of(Plan(dp_shard=2), work=workload(branches=branches), world=2) for branches in (False, True))
    assert unlike.moment == alike.moment
    assert unlike.terms["gathered parameters"] - alike.terms["gathered parameters"] == 16 * MIB
    alone = (peak_of(Plan(dp_replicate=2), work=workload(branches=branches), world=2) for branches in (False, True))
    assert len({one.peak_bytes for one in alone}) == 1


def test_zero2_keeps_every_block_gathered_and_zero3_one_and_the_next():
    def gathered(plan):
        return max(
            peak_memory(workload(blocks=count, steps={"32-true": step(blocks=count)}), plan, hardware(2)).terms[
                "gathered parameters"
            ]
            for count in (8,)
        )

    assert gathered(Plan(dp_shard=2, reshard_after_forward=False)) == (8 + 8 * 16) * MIB
    assert gathered(Plan(dp_shard=2)) <= (8 + 2 * 16) * MIB


def wrapped(**changes):
    """A model whose embedding, of 8 MiB, runs before its blocks as a segment of its own."""
    first = segment("embedding", saved=0, entry=0, peak=MIB, exit_=0, backward_peak=MIB)
    steps = {"32-true": dataclasses.replace(step(), segments=(first, *step().segments))}
    parameters = tuple(
        dataclasses.replace(one, block="embedding") if one.name == "embedding" else one for one in workload().parameters
    )
    return workload(steps=steps, parameters=parameters, wraps=("embedding",), **changes)


def test_what_is_wrapped_is_gathered_with_the_blocks_and_else_with_the_root():
    work = wrapped()
    plan = Plan(dp_shard=2)
    # Without a plan that wraps it, it is as if it were not known.
    plain = peak_memory(work, plan, hardware(2))
    assert plain.terms == peak_of(plan, world=2).terms
    assert peak_memory(work, Plan(), hardware(1)).terms == peak_of().terms
    least = peak_memory(work, dataclasses.replace(plan, extra_fsdp_modules=("embedding",)), hardware(2))
    assert plain.moment == least.moment == "backward of what follows blocks.3"
    # The embedding's 8 MiB, its gradient's, and holes of one in twenty.
    assert plain.terms["gathered parameters"] - least.terms["gathered parameters"] == 8 * MIB
    assert plain.terms["unreduced gradients"] == 8 * MIB
    assert "unreduced gradients" not in least.terms
    # Kept until its backward, it is there as the root is, but for its gradient.
    kept = dataclasses.replace(plan, reshard_after_forward=False)
    least = peak_memory(work, dataclasses.replace(kept, extra_fsdp_modules=("embedding",)), hardware(2))
    assert least.terms["gathered parameters"] == MODEL
    assert least.peak_bytes <= peak_memory(work, kept, hardware(2)).peak_bytes


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


@pytest.mark.parametrize("shard", [2, 4, 8])
def test_sharding_divides_states(shard):
    sizes = Sizes(workload(), Plan(dp_shard=shard), "cpu")
    assert sizes.parameters == sizes.gradients == MODEL // shard
    assert sizes.optimizer_state == 2 * MODEL // shard
