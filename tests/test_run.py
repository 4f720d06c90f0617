"""A run ends with the Trainer's: nothing of it is left in the strategy, whose process groups may be dropped."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from models import Language, trainer
from ranks import quiet

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Refers(Callback):
    """Keeps a weak reference to the run."""

    def on_train_start(self, trainer, module):
        self.run = weakref.ref(trainer.strategy._run)


class Fails(Language):
    """Fails in a step."""

    def training_step(self, batch, index):
        if index == 1:
            raise ValueError("boom")
        return super().training_step(batch, index)


@pytest.mark.parametrize("kind", [Language, Fails])
@pytest.mark.parametrize("plan", [Plan(), Plan(offload_optimizer="cpu", offload_parameters="cpu")])
def test_nothing_refers_to_a_run_that_is_over(kind, plan):
    refers = Refers()
    fitted = trainer(LargeScaleStrategy(plan), max_steps=3, callbacks=[refers])
    gc.collect()
    gc.disable()
    try:
        if kind is Fails:
            with pytest.raises(ValueError, match="boom"):
                fitted.fit(kind())
        else:
            fitted.fit(kind())
        assert fitted.strategy.lightning_module is not None
        assert refers.run() is None
    finally:
        gc.enable()


def test_an_optimizer_steps_without_a_run():
    """As Lightning's own tests of loops have it step."""
    strategy, model = LargeScaleStrategy(Plan()), BoringModel()
    strategy.connect(model)
    model.trainer = trainer(strategy)
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        loss = model(torch.ones(1, 32)).sum()
        loss.backward()
        return loss

    strategy.optimizer_step(optimizer, closure, model=model)
    assert not torch.equal(model.layer.weight, before)
