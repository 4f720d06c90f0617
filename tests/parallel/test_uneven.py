"""Prediction over samples that do not divide among ranks: every sample once, and nobody waits for ever."""

from __future__ import annotations

import pytest
from models import Language, Tokens, trainer
from ranks import quiet
from torch.utils.data import DataLoader

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Predicting(Language):
    steps = 0

    def predict_step(self, batch, index, dataloader_idx=0):
        self.steps += 1
        return super().predict_step(batch, index)


def predict(plan, samples):
    model = Predicting()
    run = trainer(LargeScaleStrategy(plan), devices=2, use_distributed_sampler=True)
    loaders = [DataLoader(Tokens(count), batch_size=2) for count in (samples, 2)]
    predicted = run.predict(model, dataloaders=loaders)
    return model.steps, [sum(len(batch) for batch in batches) for batches in predicted]


@pytest.mark.parametrize(
    "plan", [Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False), Plan(dp_replicate=2)]
)
def test_every_sample_is_predicted_once(two, plan):
    assert two.run(predict, plan, 5) == [(3, [3, 1]), (2, [2, 1])]
    assert two.run(predict, plan, 8) == [(3, [4, 1]), (3, [4, 1])]
