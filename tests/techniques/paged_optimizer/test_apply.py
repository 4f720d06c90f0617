"""Optimizers that step page by page, however often they are set up."""

from __future__ import annotations

import pytest
from models import Language, trainer
from ranks import quiet

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Twice(Language):
    """Has the strategy set up other optimizers before the first step."""

    def on_train_start(self):
        self.trainer.strategy.setup_optimizers(self.trainer)


def losses(plan):
    module = Twice()
    trainer(LargeScaleStrategy(plan), max_steps=4).fit(module)
    return module.losses


@pytest.mark.parametrize("plan", [Plan(offload_optimizer="cpu"), Plan(release_gradients=True)])
def test_optimizers_are_set_up_once_more(plan):
    assert losses(plan) == losses(Plan())
