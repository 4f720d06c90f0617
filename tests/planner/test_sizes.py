"""What a plan divides and what it gathers, group by group."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, parameter, step, workload
from workload.families import GPT, tokens

from lightning_largescale.plan import Plan
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.tiers import shard_bytes
from lightning_largescale.workload import Workload

PLAIN = Plan()
MODEL = 8 * MIB + 4 * 16 * MIB


@pytest.mark.parametrize("shard", [2, 4, 8])
def test_sharding_divides_states(shard):
    sizes = Sizes(workload(), Plan(dp_shard=shard), "cpu")
    assert sizes.parameters == sizes.gradients == MODEL // shard
    assert sizes.optimizer_state == 2 * MODEL // shard


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


def test_frozen_and_unused_parameters_have_no_gradient():
    frozen = (parameter("a", None, trainable=False), parameter("b", None, used=False), parameter("c", None))
    assert Sizes(workload(parameters=frozen), PLAIN, "cpu").gradients == frozen[2].bytes
    # But the buckets of replicas have a place for it.
    assert Sizes(workload(parameters=frozen), Plan(dp_replicate=2), "cpu").gradients == 2 * frozen[2].bytes


def test_a_block_that_runs_twice_is_gathered_and_reduced_once():
    once = step(blocks=2)
    first, second = (segment for segment in once.segments if segment.block)
    twice = dataclasses.replace(once, segments=(first, second, first))
    sizes = Sizes(workload(blocks=2, steps={"32-true": twice}), Plan(dp_shard=2), "cpu")
    assert sizes.gathered_so_far == [(8 + 16) * MIB, (8 + 32) * MIB, (8 + 32) * MIB]
    assert sizes.kept_from_here == [16 * MIB, 16 * MIB, 8 * MIB, 0]


@given(rows=st.integers(1, 4000), shard=st.integers(1, 64))
def test_a_shard_is_the_padded_share(rows, shard):
    whole = parameter("a", None, rows=rows, columns=3)
    share = shard_bytes(whole.shape, whole.bytes, shard)
    assert whole.bytes / shard <= share < whole.bytes / shard + 12 or shard == 1
    assert share * shard >= whole.bytes


TABLES = {"row_sharded_embeddings": ("users",)}


def with_table(**changes):
    """A table of 1000 rows of 64 bytes beside the blocks; a batch of 10 ids."""
    parameters = (*workload().parameters, parameter("users.weight", None, rows=1000, columns=16, **changes))
    return workload(parameters=parameters, batch_bytes=80)


@pytest.mark.parametrize("plan", [{"dp_replicate": 4}, {"dp_shard": 4}, {"dp_shard": 2, "dp_replicate": 2}])
def test_rows_of_tables_are_divided_over_all_ranks(plan):
    dense, sizes = (Sizes(work, Plan(**plan, **TABLES), "cpu") for work in (workload(), with_table()))
    assert sizes.parameters - dense.parameters == 250 * 64
    assert sizes.gradients - dense.gradients == sizes.ungrouped_gradients == 10 * 64
    assert sizes.gathered(None) == dense.gathered(None)
    assert sizes.gradient(None, whole=True) == dense.gradient(None, whole=True)


def test_a_table_on_one_device_is_whole():
    sizes = Sizes(with_table(), Plan(**TABLES), "cpu")
    assert sizes.ungrouped == {}
    assert sizes.parameters == MODEL + 64_000


def test_a_frozen_table_has_no_gradient():
    assert Sizes(with_table(trainable=False), Plan(dp_shard=2, **TABLES), "cpu").ungrouped_gradients == 0


def test_optimizer_state_of_a_table():
    work = with_table()
    needs = dataclasses.replace(work.optimizers[0], state_bytes={"users.weight": 64_000})
    sizes = Sizes(dataclasses.replace(work, optimizers=(needs,)), Plan(dp_replicate=4, **TABLES), "cpu")
    assert sizes.optimizer_state == 16_000
