"""What a plan divides and what it gathers, group by group."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, parameter, step, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.sizes import Sizes, local_bytes

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


def test_frozen_and_unused_parameters_have_no_gradient():
    frozen = (parameter("a", None, trainable=False), parameter("b", None, used=False), parameter("c", None))
    assert Sizes(workload(parameters=frozen), PLAIN, "cpu").gradients == frozen[2].bytes


def test_a_block_that_runs_twice_is_gathered_and_reduced_once():
    once = step(blocks=2)
    first, second = (segment for segment in once.segments if segment.block)
    twice = dataclasses.replace(once, segments=(first, second, first))
    sizes = Sizes(workload(blocks=2, steps={"32-true": twice}), Plan(dp_shard=2), "cpu")
    assert sizes.gathered_so_far == [(8 + 16) * MIB, (8 + 32) * MIB, (8 + 32) * MIB]
    assert sizes.gradients_from_here == [16 * MIB, 16 * MIB, 8 * MIB, 0]


@given(rows=st.integers(1, 4000), shard=st.integers(1, 64))
def test_a_shard_is_the_padded_share(rows, shard):
    whole = parameter("a", None, rows=rows, columns=3)
    share = local_bytes(whole, shard)
    assert whole.bytes / shard <= share < whole.bytes / shard + 12 or shard == 1
    assert share * shard >= whole.bytes
