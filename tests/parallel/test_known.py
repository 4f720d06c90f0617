"""Parameters that come after setup: a sentence at the next step on every rank, and Lightning's way on one device."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch import Callback
from models import Language, trainer
from ranks import quiet
from torch import nn

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = [Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False), Plan(dp_replicate=2)]
IDS = ["ZeRO-3", "ZeRO-2", "replicate"]
SOME = [pytest.param(p, id=i, marks=pytest.mark.slow if i == "ZeRO-2" else []) for p, i in zip(PLANS, IDS, strict=True)]


class Grown(Language):
    """Uses what callbacks may have given it."""

    def forward(self, tokens):
        x = super().forward(tokens)
        return self.more(x) if hasattr(self, "more") else x

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Early(Callback):
    """Adds a layer before the first step."""

    def on_train_start(self, trainer, module):
        module.more = nn.Linear(16, 16)
        trainer.optimizers[0].add_param_group({"params": module.more.parameters()})


class Late(Callback):
    """Adds a layer in the middle."""

    frozen, told = False, True

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2:
            torch.manual_seed(3)
            module.more = nn.Linear(16, 16).requires_grad_(not self.frozen)
            if self.told and not self.frozen:
                trainer.optimizers[0].add_param_group({"params": module.more.parameters()})


class Untold(Late):
    """Adds a layer that the optimizer does not know of."""

    told = False


class Frozen(Late):
    """Adds a layer in the middle that is not trained."""

    frozen = True


class Foreign(Callback):
    """Gives the optimizer a parameter that the module does not have."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2:
            trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(3))]})


class Replaced(Callback):
    """Puts another parameter in the place of one, as pruning and surgery do."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 1:
            module.blocks[0].up.weight = nn.Parameter(module.blocks[0].up.weight.detach().clone())


def fit(callback, plan, devices):
    model = Grown(seed=int(os.environ.get("RANK", 0)))
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, callbacks=[callback()], max_steps=4)
    try:
        run.fit(model)
    except PlanError as error:
        return len(model.losses), str(error)
    return model.losses


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize(
    ("callback", "steps", "message"),
    [
        (Early, 0, "SGD holds a parameter of shape (16, 16) that is not of Grown as it was"),
        (Late, 2, "SGD holds a parameter of shape (16, 16) that is not of Grown as it was"),
        (Untold, 2, "parameter 'more.weight' is not of Grown as it was"),
        (Foreign, 2, "SGD holds a parameter of shape (3,) that is not of Grown as it was"),
        (Replaced, 2, "parameter 'blocks.0.up.weight' is not of Grown as it was"),
    ],
)
def test_others_are_refused_at_the_next_step(two, callback, steps, message, plan):
    for done, told in two.run(fit, callback, plan, 2):
        assert done == steps
        assert message in told
        assert "make it in __init__ or configure_model" in told


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_those_that_are_not_trained_may_come(two, plan):
    for losses in two.run(fit, Frozen, plan, 2):
        assert losses == pytest.approx(fit(Frozen, None, 1), rel=1e-5)


@pytest.mark.parametrize("callback", [Early, Late, Untold, Foreign, Replaced])
def test_one_process_takes_them_as_lightning_does(callback):
    torch.manual_seed(0)
    expected = fit(callback, None, 1)
    torch.manual_seed(0)
    assert fit(callback, Plan(), 1) == expected
