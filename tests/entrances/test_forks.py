"""What a process has after its forks trained: the weights, the metrics, and where the checkpoints are."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Language, read_checkpoint, trainer
from ranks import quiet
from torch import nn

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

# Python 3.12 and later warn of forks where threads exist; torch's idle ones are what one thread a fork is for.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

PLANS = {
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
}


def fit(strategy, devices, folder):
    model = Language(tied=True)
    keep = ModelCheckpoint(folder, monitor="val_loss", save_last=True)
    options = {"val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 0, "callbacks": [keep]}
    run = trainer(strategy, devices=devices, max_steps=4, enable_checkpointing=True, **options)
    run.fit(model)
    return run, model, keep


@pytest.mark.parametrize("plan", PLANS)
def test_after_forks_the_parent_has_what_they_trained(monkeypatch, tmp_path, plan):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("MASTER_PORT", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    _, expected, _ = fit("auto", 1, tmp_path / "plain")
    run, model, keep = fit(LargeScaleStrategy(PLANS[plan], start_method="fork"), 2, tmp_path / "ours")
    assert run.model is run.lightning_module is model
    assert run.strategy.plan == PLANS[plan]
    assert model.head.weight is model.embedding.weight
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=1e-3, atol=2e-3)
    assert {"loss", "val_loss"} <= run.callback_metrics.keys()
    assert os.path.dirname(keep.best_model_path) == str(tmp_path / "ours")
    saved = read_checkpoint(keep.best_model_path)["state_dict"]
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
