"""Batches that are no tensors train and evaluate as in a plain run, under every plan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from models import GLOBAL_BATCH, Language, Tokens, trainer
from ranks import quiet
from torch.utils.data import DataLoader, DistributedSampler

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = {
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
    "recomputed": Plan(dp_shard=2, activation_checkpointing="full"),
    "auto": "auto",
}


@dataclasses.dataclass
class Record:
    tokens: torch.Tensor
    name: str


class Own:
    """A user's class of a batch, with what Lightning moves to the device by."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.moved = False

    def to(self, device, **kwargs):
        self.tokens, self.moved = self.tokens.to(device), True
        return self


class Still:
    """A class of which nobody knows anything."""

    def __init__(self, tokens):
        self.tokens = tokens


# What a loader gives for samples, and the tokens in it.
KINDS = {
    "dict": (
        lambda samples: {"x": torch.stack(samples), "names": ["a"] * len(samples), "none": None, "flag": True, "n": 3},
        lambda batch: batch["x"],
    ),
    "dataclass": (lambda samples: Record(torch.stack(samples), "name"), lambda batch: batch.tokens),
    "list of objects": (
        lambda samples: [Still(sample) for sample in samples],
        lambda batch: torch.stack([one.tokens for one in batch]),
    ),
    "own": (lambda samples: Own(torch.stack(samples)), lambda batch: batch.tokens if batch.moved else None),
    "numpy": (lambda samples: torch.stack(samples).numpy(), torch.from_numpy),
    "numpy in a tuple": (
        lambda samples: (np.stack([sample.numpy() for sample in samples]), None, "text"),
        lambda batch: torch.from_numpy(batch[0]),
    ),
    "strings": (
        lambda samples: [" ".join(map(str, sample.tolist())) for sample in samples],
        lambda batch: torch.tensor([[int(token) for token in text.split()] for text in batch]),
    ),
}


class Reads(Language):
    def __init__(self, kind):
        super().__init__()
        self.collate, self.tokens = KINDS[kind]

    def training_step(self, batch, index):
        return super().training_step(self.tokens(batch), index)

    def validation_step(self, batch, index):
        loss = self.loss(self.tokens(batch))
        self.evaluated.append(float(self.all_gather(loss).mean()))
        self.log("val_loss", loss, sync_dist=True, batch_size=1)

    def predict_step(self, batch, index):
        return super().predict_step(self.tokens(batch), index)

    def loader(self):
        world = self.trainer.world_size
        sampler = DistributedSampler(Tokens(), world, self.trainer.global_rank, shuffle=False)
        return DataLoader(Tokens(), batch_size=GLOBAL_BATCH // world, sampler=sampler, collate_fn=self.collate)

    train_dataloader = val_dataloader = predict_dataloader = loader


def life(plan, devices, kind):
    """Losses of training and evaluation, and what the planner had to say of its trace."""
    model = Reads(kind)
    strategy = LargeScaleAutoStrategy() if plan == "auto" else LargeScaleStrategy(plan) if plan else "auto"
    options = {"max_steps": 3, "limit_val_batches": 2, "limit_predict_batches": 2, "num_sanity_val_steps": 0}
    run = trainer(strategy, devices=devices, val_check_interval=3, **options)
    run.fit(model)
    run.validate(model, verbose=False)
    predicted = run.predict(model)
    notes = run.strategy.report.workload.approximate if plan == "auto" else ()
    return model.losses + model.evaluated, [tuple(one.shape) for one in predicted], notes


def lives(plan, devices):
    return {kind: life(plan, devices, kind) for kind in KINDS}


@pytest.mark.parametrize("plan", [pytest.param(p, marks=[] if p == "ZeRO-3" else pytest.mark.slow) for p in PLANS])
def test_batches_of_any_kind(two, plan):
    expected = lives(None, 1)
    for found in two.run(lives, PLANS[plan], 2):
        for kind, (losses, predicted, notes) in found.items():
            assert losses == pytest.approx(expected[kind][0], rel=1e-5), kind
            assert len(predicted) == 2, kind
            # What the trace could not find in the batch, it says.
            unknown = any(note.startswith("no tensor was found in the batch, a") for note in notes)
            assert unknown == (plan == "auto" and kind not in ("dict", "dataclass")), (kind, notes)
