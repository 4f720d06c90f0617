"""Replication: parameters that steps do not use train as in a plain run, and nothing is printed of it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Block, Language, trainer
from ranks import quiet
from torch import nn

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Unused(Language):
    """Some parameters are never used, one block in every other step: weight decay must not touch the unused."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.spare = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens):
        x = super().forward(tokens)
        return self.spare[0](x) if len(self.losses) % 2 else x

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def fit(plan, devices):
    model = Unused()
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=8)
    run.fit(model)
    weight = model.never.weight.detach()
    copied = None
    if plan is None or plan.dp_shard == 1:
        copied = type(copy.deepcopy(model)) is Unused
    return model.losses, getattr(weight, "full_tensor", lambda: weight)(), copied


@pytest.mark.parametrize(
    "plan", [Plan(dp_replicate=2), Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False)]
)
def test_unused_parameters(two, plan, capfd):
    expected, untouched, _ = fit(None, 1)
    for losses, weight, copied in two.run(fit, plan, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert torch.equal(weight, untouched)
        assert copied in (True, None)
    assert "find_unused_parameters" not in capfd.readouterr().err


def reductions(accumulated):
    """How often gradients were reduced in two optimizer steps of so many micro-batches each."""
    model = Language()
    run = trainer(LargeScaleStrategy(Plan(dp_replicate=2)), devices=2, max_steps=2, accumulate_grad_batches=accumulated)
    count = []

    def hook(state, bucket):
        count.append(bucket.index())
        return (
            torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])
        )

    wrap = torch.nn.parallel.DistributedDataParallel.__init__

    def init(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    torch.nn.parallel.DistributedDataParallel.__init__ = init
    try:
        run.fit(model)
    finally:
        torch.nn.parallel.DistributedDataParallel.__init__ = wrap
    return len(count), model.losses


def test_accumulation_reduces_once_a_step(two):
    assert {count for count, _ in two.run(reductions, 1)} == {count for count, _ in two.run(reductions, 4)}
