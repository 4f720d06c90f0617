"""What the ranks of test_averages run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from models import GLOBAL_BATCH, Language, read_checkpoint, trainer
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale.strategy import LargeScaleStrategy

KINDS = {
    "swa": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2),
    "average": lambda: WeightAveraging(),
    "ema": lambda: EMAWeightAveraging(decay=0.5),
}
EPOCHS, STEPS = 4, 2  # of training, in an epoch
# What these callbacks say of themselves in runs of this size.
NOISE = "Swapping scheduler|SWA is currently only|Checkpoint directory|The dirpath has changed"


class Steady(Language):
    """Trained by plain gradient descent: Adam makes steps out of rounding where a gradient is nearly none."""

    def __init__(self, *, buffers=False, **options):
        super().__init__(samples=STEPS * GLOBAL_BATCH, layers=2, **options)
        if buffers:
            self.register_buffer("seen", torch.zeros(2))

    def on_train_batch_start(self, batch, index):
        if hasattr(self, "seen"):
            self.seen += 1

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Normalised(Steady):
    """With running statistics, which an averaged model gathers in a pass of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.blocks.append(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(16), nn.Unflatten(0, (-1, 8))))


def strategy_of(plan):
    return plan if plan is None or isinstance(plan, str) else LargeScaleStrategy(plan)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def average_of(callback):
    made = callback._average_model
    return getattr(made, "module", made)


def train(plan, devices, kind, folder, *, resume=None, model=Steady, then=(), epochs=EPOCHS):
    """Losses, evaluations, final weights and the rank's bytes of the average; checkpoints in `folder`."""
    module = model(seed=int(os.environ.get("RANK", 0)) + (7 if resume else 0), buffers=True)
    callback = KINDS[kind]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        for given in (plan, *then):
            keeps = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
            run = trainer(
                strategy_of(given) or "auto",
                devices=devices,
                max_steps=-1,
                max_epochs=epochs,
                limit_val_batches=1,
                callbacks=[callback, keeps],
                enable_checkpointing=True,
            )
            run.fit(module, ckpt_path=resume)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in average_of(callback).parameters()]
    weights = {name: whole(value) for name, value in module.state_dict().items()}
    return {
        "losses": module.losses,
        "evaluated": module.evaluated,
        "weights": weights,
        "held": sum(part.untyped_storage().nbytes() for part in local),
        "whole": sum(parameter.numel() * 4 for parameter in module.parameters()),
    }


def checkpoints(folder):
    """Their contents by name."""
    return {path.name: read_checkpoint(path) for path in sorted(Path(folder).iterdir())}
