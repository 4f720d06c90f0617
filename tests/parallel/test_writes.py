"""Writes into gathered parameters beyond the tables of user actions: casts, recomputation, compiled blocks."""

from __future__ import annotations

import pytest
import torch
from models import Language, trainer
from ranks import quiet
from torch.nn.functional import normalize

from lightning_largescale import LargeScaleStrategy, Plan, PlanError

pytestmark = quiet


class Normalised(Language):
    """Keeps the rows of a matrix of each block, or those outside of blocks, at length one."""

    def __init__(self, where, **options):
        super().__init__(**options)
        self.where = where
        for block in self.blocks if where == "block" else ():
            block.up.register_forward_pre_hook(lambda layer, _: self.normalise(layer))

    @staticmethod
    @torch.no_grad()
    def normalise(layer):
        layer.weight.copy_(normalize(layer.weight, dim=1))

    def training_step(self, batch, index):
        if self.where == "root":
            self.normalise(self.head)
        return super().training_step(batch, index)


def fit(plan, devices, where, compile=False):
    torch.compiler.reset()
    model = Normalised(where)
    strategy = LargeScaleStrategy(plan, compile=compile) if plan else "auto"
    trainer(strategy, devices=devices, max_steps=3).fit(model)
    return model.losses


@pytest.mark.parametrize("where", ["block", "root"])
def test_each_rank_has_a_share_of_the_batch(two, where):
    plain = fit(None, 1, where)
    for losses in two.run(fit, Plan(dp_shard=2), 2, where):
        assert losses == pytest.approx(plain, rel=1e-5)


def test_what_is_gathered_in_fewer_bits_is_refused(two):
    with pytest.raises(
        PlanError, match=r"'blocks.0.up.weight' was written into while it was gathered in torch.bfloat16"
    ):
        two.run(fit, Plan(dp_shard=2, precision="bf16-mixed"), 2, "block")


def test_what_stays_in_all_its_bits_is_not(two):
    plan = Plan(dp_shard=2, precision="bf16-mixed")
    one, other = two.run(fit, plan, 2, "root")
    assert one == other == pytest.approx(fit(None, 1, "root"), rel=1e-2)


@pytest.mark.parametrize(
    ("plan", "devices"),
    [
        (Plan(activation_checkpointing="full"), 1),
        (Plan(dp_shard=2, activation_checkpointing="full"), 2),
        (Plan(dp_replicate=2, activation_checkpointing="full"), 2),
    ],
)
def test_a_forward_that_runs_twice_does_not_write_twice(two, plan, devices):
    with pytest.raises(PlanError, match=r"Block writes into its parameter 'up.weight' in forward"):
        fit(plan, 1, "block") if devices == 1 else two.run(fit, plan, 2, "block")


def test_compiled_blocks_write_too(two):
    plain = fit(None, 1, "block")
    for losses in two.run(fit, Plan(dp_shard=2), 2, "block", {"backend": "aot_eager"}):
        assert losses == pytest.approx(plain, rel=1e-5)
