"""What a plan divides and what it gathers, group by group."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, parameter, step, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.tiers import shard_bytes

PLAIN = Plan()


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
