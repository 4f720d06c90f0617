"""Modules that come to be in parts: built without values, their weights read by slices; with a plain run's numbers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from families import FAMILIES, Family
from lightning.pytorch import LightningModule
from models import trainer
from ranks import quiet
from torch.distributed.tensor import DTensor

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

SEED = 11


class Late(Family):
    """A family's model, built where Lightning asks for it."""

    def __init__(self, name):
        LightningModule.__init__(self)
        self.name, self.model = name, None
        self.losses = []

    def configure_model(self):
        if self.model is None:
            self.model = FAMILIES[self.name]()

    def on_fit_start(self):
        # As it was built, before anything is trained.
        self.divided = [name for name, one in self.named_parameters() if isinstance(one, DTensor)]
        with self.trainer.strategy.full_parameters() if self.divided else contextlib.nullcontext():
            self.built = [*self.model.state_dict().items(), *self.model.named_buffers()]
            self.built = {name: value.detach().clone() for name, value in self.built}
        self.drawn = torch.rand(3)


class Watched(LargeScaleStrategy):
    """Counts what has no values when it is set up."""

    def setup(self, trainer):
        self.without = sum(one.is_meta for one in self.lightning_module.parameters())
        super().setup(trainer)


def built(name, plan, devices):
    """Values of a model as it was built, what the generator drew next, names of what was divided, and the losses."""
    torch.manual_seed(SEED)
    model = Late(name)
    made = trainer(Watched(plan) if plan else "auto", devices=devices, max_steps=1)
    made.fit(model)
    if plan is not None:
        assert made.strategy.without == len(list(model.parameters()))
    return model.built, model.drawn, model.divided, model.losses


def assert_built_alike(found, expected):
    values, drawn, _, losses = found
    assert list(values) == list(expected[0])
    for name, value in expected[0].items():
        assert torch.equal(values[name], value), name
    assert torch.equal(drawn, expected[1])
    assert losses == pytest.approx(expected[3], rel=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in ("gpt2", "torch") else pytest.mark.slow) for one in FAMILIES]
)
def test_numbers_of_a_plain_construction(two, name):
    expected = built(name, None, 1)
    for plan in (Plan(dp_shard=2), Plan(tp=2)):
        for found in two.run(built, name, plan, 2):
            assert_built_alike(found, expected)
            assert found[2]
