"""Modules called in and outside of steps find their parameters unsharded, also in backward and when unfrozen."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from models import Language, trainer
from parallel.test_sharded_step import PLANS, fit
from ranks import quiet
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Penalised(Language):
    """The gradient of the blocks' output is part of the loss."""

    def training_step(self, batch, index):
        x = self.embedding(batch[:, :-1]).detach().requires_grad_()
        out = x
        for block in self.blocks:
            out = block(out)
        (slope,) = torch.autograd.grad(self.head(out).pow(2).mean(-1).sum(), x, create_graph=True)
        loss = self.loss(batch) + (10 * slope).pow(2).mean()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss


@dataclass(frozen=True)
class Hidden:
    """What a block of some models returns."""

    x: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return Hidden(self.block(x))


class Unusual(Language):
    """Blocks whose output is an object that nobody may change."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped(block) for block in self.blocks)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x).x
        return self.norm(x)


class Unfreeze(Callback):
    """Trains the head alone at first, then everything, and at the end all but the embedding."""

    def on_train_batch_start(self, trainer, module, batch, index):
        step = trainer.global_step
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name == "head.weight" or (step >= 3 and (step < 6 or "embedding" not in name)))


class Unfrozen(Language):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("plan", PLANS)
def test_blocks_that_return_frozen_objects(two, plan):
    for losses in two.run(fit, Unusual, plan, 2, max_steps=4):
        assert losses == pytest.approx(fit(Unusual, None, 1, max_steps=4), rel=1e-5)


TWICE = [*PLANS[1:], Plan(dp_shard=2, activation_checkpointing="full")]


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("plan", [*PLANS[:1], *(pytest.param(plan, marks=pytest.mark.slow) for plan in TWICE)])
def test_second_derivatives(two, plan, accumulated):
    options = {"max_steps": 4, "accumulate_grad_batches": accumulated}
    for losses in two.run(fit, Penalised, plan, 2, **options):
        assert losses == pytest.approx(fit(Penalised, None, 1, **options), rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_unfrozen_between_steps_train(two, plan):
    for losses in two.run(fit, Unfrozen, plan, 2, [Unfreeze], max_steps=8):
        assert losses == pytest.approx(fit(Unfrozen, None, 1, [Unfreeze], max_steps=8), rel=1e-5)


def gathers():
    """Parameters gathered in one step of training, by name, in order; and how many are gathered when all is done."""
    seen = []

    class Traced(Language):
        def on_fit_start(self):
            for name, group in self.named_modules():
                if hasattr(group, "unshard"):
                    group.register_forward_pre_hook(lambda part, inputs, name=name: seen.append(name))

    model = Traced(tied=True)
    run = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=1)
    run.fit(model)
    return (
        seen,
        sum(not isinstance(p, DTensor) for p in model.parameters()),
        model.head.weight is model.embedding.weight,
    )


def test_groups_are_the_blocks_and_nothing_stays_gathered(two):
    for seen, left, tied in two.run(gathers):
        assert seen == ["", "blocks.0", "blocks.1", "blocks.2"]
        assert left == 0
        assert tied
