import contextlib
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import LayerSync
from torch import nn
from torch.utils.data import DataLoader

from lightning_largescale import compat


def test_attached_trainer():
    module, trainer = LightningModule(), object()
    assert compat.attached_trainer(module) is None
    compat.attach_trainer(module, trainer)
    assert compat.attached_trainer(module) is module.trainer is trainer


def test_pruning_originals():
    layer = nn.Linear(2, 2)
    pruning = ModelPruning("l1_unstructured", [(layer, "weight")])
    assert compat.pruning_originals(pruning) == []
    pruning.setup(None, nn.Sequential(layer), "fit")
    (original,) = compat.pruning_originals(pruning)
    assert original is not layer
    assert torch.equal(original.weight, layer.weight)


def test_skips_backward():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not compat.skips_backward(trainer)
    trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = True
    assert compat.skips_backward(trainer)


@pytest.mark.filterwarnings("ignore:.* is deprecated", "ignore:.*does not have many workers")
def test_flag_sigterm_only():
    before = signal.getsignal(signal.SIGTERM)
    passed_on = []

    class Sends(BoringModel):
        def on_train_start(self):
            self.trainer.strategy._launcher = SimpleNamespace(kill=passed_on.append)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = Trainer(accelerator="cpu", max_steps=4, limit_val_batches=0, **quiet)
    compat.flag_sigterm_only(run)
    with pytest.raises(SystemExit):
        run.fit(Sends())
    assert run.global_step == 1
    assert passed_on == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.filterwarnings("ignore:.* is deprecated", "ignore:.*does not have many workers")
def test_requeue_signal_counted_and_called_before_batches(tmp_path, monkeypatch):
    for name in ("NTASKS", "NTASKS_PER_NODE", "JOB_ID", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    monkeypatch.setenv("SLURM_NODELIST", "127.0.0.1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = []

    class Sends(BoringModel):
        def training_step(self, batch, index):
            os.kill(os.getpid(), signal.SIGUSR1)
            told.append(index)
            return super().training_step(batch, index)

        def on_save_checkpoint(self, checkpoint):
            told.append("saved")

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"limit_val_batches": 0, "plugins": [SLURMEnvironment()], "default_root_dir": tmp_path, **quiet}
    run = Trainer(accelerator="cpu", max_steps=2, **options)
    with (
        compat.requeue_signal_counted(run, lambda: told.append("signal")) as save_and_requeue,
        compat.called_before_batches(run, lambda: told.append("before")),
    ):
        run.fit(Sends())
    assert told == ["before", "signal", 0, "before", "signal", 1]
    save_and_requeue()
    assert told[-1] == "saved"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    assert not {"advance", "_slurm_sigusr_handler_fn"} & {*vars(run.fit_loop.epoch_loop), *vars(run._signal_connector)}


def test_logs_checkpoints(tmp_path):
    class Own(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            """Uploads it."""

    assert compat.logs_checkpoints(Own(tmp_path))
    assert not any(compat.logs_checkpoints(kind(tmp_path)) for kind in (CSVLogger, TensorBoardLogger))
    assert not compat.logs_checkpoints(object.__new__(CometLogger))
    for kind in (WandbLogger, MLFlowLogger):
        # Their constructors want packages that need not be here.
        for log_model in ("all", True, False):
            logger = object.__new__(kind)
            logger._log_model = log_model
            assert compat.logs_checkpoints(logger) is bool(log_model)


def test_set_received_sigterm():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for received in (True, False):
        compat.set_received_sigterm(trainer, received)
        assert trainer.received_sigterm is received


@pytest.mark.filterwarnings("ignore:.* is deprecated", "ignore:.*does not have many workers")
def test_evaluation_is_empty_and_call_when_exhausted():
    class Told(BoringModel):
        def on_validation_start(self):
            self.told = [compat.evaluation_is_empty(self.trainer)]
            compat.call_when_exhausted(self.trainer, lambda: self.told.append("exhausted"))

        def validation_step(self, batch, index):
            self.told.append(index)

    for batches, loader in ((2, iter([torch.ones(1, 32)] * 2)), (3, DataLoader(torch.ones(4, 32))), (0, iter([]))):
        model = Told()
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(accelerator="cpu", limit_val_batches=3, **options).validate(model, dataloaders=loader, verbose=False)
        # With a limit nothing is looked for.
        assert model.told == [False, *range(batches), "exhausted"]
    model = Told()
    Trainer(accelerator="cpu", **options).validate(model, dataloaders=iter([]), verbose=False)
    assert model.told == [True, "exhausted"]


def test_logged_hparams():
    module = BoringModel()
    module.save_hyperparameters({"width": 3}, logger=False)
    assert compat.logged_hparams(module) == {}
    # As LightningCLI adds for itself.
    module.save_hyperparameters({"width": 3, "_class_path": "BoringModel"})
    assert compat.logged_hparams(module) == {"width": 3}


def test_layer_sync():
    for wanted in (False, True):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=wanted, logger=False,
            enable_checkpointing=False,
        )  # fmt: skip
        assert isinstance(compat.layer_sync(trainer.strategy), LayerSync) is wanted


class Hooked(BoringModel):
    def on_train_start(self):
        HOOKS.append("runs")


HOOKS: list[str] = []


def test_around_hooks(tmp_path):
    @contextlib.contextmanager
    def around(name):
        HOOKS.append(f"before {name}")
        yield
        HOOKS.append(f"after {name}")

    trainer = Trainer(
        accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    HOOKS.clear()
    with compat.around_hooks(trainer, around):
        trainer.fit(Hooked())
    place = HOOKS.index("runs")
    assert HOOKS[place - 1 : place + 2] == ["before on_train_start", "runs", "after on_train_start"]
    assert {"before optimizer_step", "before on_after_backward", "before on_before_zero_grad"} <= {*HOOKS}
    assert not any("training_step" in hook for hook in HOOKS)
    assert "profile" not in vars(trainer.profiler)
