"""A Trainer inside a hook of another one's fit: it works, and the outer fit goes on as if it had not been there."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from models import Language, trainer
from ranks import quiet

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = {
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
}
INNER = {"ours": lambda: LargeScaleStrategy(Plan()), "auto": LargeScaleAutoStrategy, "lightning's": lambda: "auto"}


class Outer(Language):
    """Trains another model to its end in a hook."""

    def __init__(self, where=None, inner=None):
        super().__init__()
        self.where, self.inner = where, inner
        self.found: list[list[float]] = []

    def nest(self, where):
        if where != self.where:
            return
        model = Language(seed=5, samples=32)
        state = torch.get_rng_state()
        with warnings.catch_warnings():
            # Lightning sees a process group and not that this Trainer is no part of it.
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
            run = trainer(INNER[self.inner](), max_steps=3, limit_val_batches=1, num_sanity_val_steps=0)
            run.fit(model)
            run.validate(model, verbose=False)
        torch.set_rng_state(state)
        self.found.append(model.losses + model.evaluated)

    def training_step(self, batch, index):
        self.nest("training_step")
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.nest("validation_step")
        return super().validation_step(batch, index)

    def on_train_batch_end(self, *args):
        self.nest("on_train_batch_end")

    def on_validation_epoch_end(self):
        self.nest("on_validation_epoch_end")


def outer(plan, devices, where=None, inner=None):
    model = Outer(where, inner)
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    options = {"max_steps": 3, "val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    run = trainer(strategy, devices=devices, **options)
    run.fit(model)
    assert run.global_step == 3
    assert run.world_size == devices
    assert model.trainer is run
    assert rank_zero_only.rank == run.global_rank
    return model.losses + model.evaluated, model.found


def alone():
    model = Language(seed=5, samples=32)
    run = trainer(max_steps=3, limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(model)
    run.validate(model, verbose=False)
    return model.losses + model.evaluated


HOOKS = ["training_step", "validation_step", "on_train_batch_end", "on_validation_epoch_end"]


def cases():
    """For every day one of ours under ZeRO-3."""
    for plan in PLANS:
        for inner in INNER:
            everyday = (plan, inner) == ("ZeRO-3", "ours")
            yield pytest.param(plan, inner, marks=() if everyday else pytest.mark.slow)


@pytest.mark.parametrize(("plan", "inner"), list(cases()))
def test_a_trainer_inside_a_fit(two, plan, inner):
    expected, _ = outer(None, 1)
    single = alone()
    for where in HOOKS:
        for losses, found in two.run(outer, PLANS[plan], 2, where, inner):
            assert losses == pytest.approx(expected, rel=1e-5), where
            assert found, where
            assert all(one == pytest.approx(single, rel=1e-5) for one in found), where
