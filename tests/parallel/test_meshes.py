"""Fits one after the other in the same ranks, whose meshes are alike and have other groups."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from models import Language, trainer
from ranks import in_own_group, quiet

from lightning_largescale import LargeScaleStrategy, Plan
from lightning_largescale.groups import drop_groups, leave_process_group
from lightning_largescale.parallel.sharded import sharded_state

pytestmark = quiet
SHARDED, TENSOR, ELSEWHERE = Plan(dp_shard=2), Plan(tp=2), Plan(dp_shard=2, offload_parameters="cpu")
HYBRID = Plan(dp_replicate=2, dp_shard=2)


def fits(plans, accelerator, leaving=False, **options):
    """Losses under the last of `plans`, after fits under the others."""
    for plan in plans:
        if leaving:
            leave_process_group()
        model = Language()
        options = {"max_steps": 3, "gradient_clip_val": 0.1, "accelerator": accelerator, **options}
        trainer(LargeScaleStrategy(plan), devices=2, **options).fit(model)
    return model.losses, dist.get_backend()


OFTEN = [SHARDED, TENSOR, Plan(tp=2, sequence_parallel=True), TENSOR]


@pytest.mark.parametrize(
    "plans", [OFTEN, pytest.param([SHARDED, SHARDED], marks=pytest.mark.slow)], ids=["tp", "shards"]
)
def test_a_fit_after_ranks_left_others(two, plans):
    expected = two.run(in_own_group, fits, plans[-1:], "cpu")
    assert two.run(in_own_group, fits, plans, "cpu", leaving=True) == expected


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("plans", [OFTEN, [SHARDED, SHARDED]], ids=["tp", "shards"])
def test_a_fit_after_ranks_left_others_of_nccl(two, plans):
    expected = two.run(in_own_group, fits, plans[-1:], "cuda")
    assert two.run(in_own_group, fits, plans, "cuda", leaving=True) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    "plans",
    [
        [SHARDED, ELSEWHERE],
        pytest.param([ELSEWHERE, SHARDED], marks=pytest.mark.slow),
        pytest.param([SHARDED, ELSEWHERE, SHARDED, ELSEWHERE], marks=pytest.mark.slow),
    ],
    ids=["once", "back", "to and fro"],
)
def test_parameters_in_dram_of_ranks_that_nccl_connects(two, plans):
    expected, _ = two.run(in_own_group, fits, plans[-1:], "cuda")[0]
    for losses, backend in two.run(in_own_group, fits, plans, "cuda"):
        assert losses == expected
        assert (backend == "nccl") == (plans[0] is SHARDED)


def fits_of_one_module(plan, devices, ending):
    """Losses of a module that is fitted twice, and whether torch knows the groups of its second fit."""
    model = Language(seed=0)
    for _ in range(2):
        trainer(LargeScaleStrategy(plan), devices=devices, max_steps=2).fit(model)
        state = sharded_state(model)
        owners = [one for one in (state.agreement, state.order) if one is not None]
        groups = [state.average.group, *(one.ranks for one in owners)]
        known = [dist.get_rank(group) >= 0 for group in groups]
        if ending:
            # As after a fit that failed on all ranks alike.
            drop_groups()
    return model.losses, all(known)


@pytest.mark.parametrize("plan", [SHARDED, TENSOR, pytest.param(HYBRID, marks=pytest.mark.slow)])
def test_a_module_is_fitted_again_in_new_groups_after_its_own_were_ended(two, four, plan):
    run = (two if plan.world_size == 2 else four).run
    expected = run(in_own_group, fits_of_one_module, plan, plan.world_size, False)
    assert run(in_own_group, fits_of_one_module, plan, plan.world_size, True) == expected
    assert all(known for _, known in expected)
