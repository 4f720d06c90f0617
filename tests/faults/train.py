"""A training run in which one rank fails as the command line says; test_launch.py runs it in processes of its own.

Marks on standard output: FAULT just before the fault, DONE after the last fit with what this rank knows of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_largescale.strategy import LargeScaleStrategy

# Lightning's advice about loaders and loggers is not what is looked at here.
warnings.simplefilter("ignore")

parser = argparse.ArgumentParser()
parser.add_argument("--fault", choices=["none", "raise", "kill", "wait", "endless"], default="none")
HOOKS = ("configure_optimizers", "on_after_backward", "optimizer_step", "on_train_epoch_end", "on_fit_end", "teardown")
parser.add_argument("--where", choices=["init", "prepare_data", "setup", "step", "loader", *HOOKS], default="step")
parser.add_argument("--rank", type=int, default=1, help="the rank that fails; 2 is both")
parser.add_argument("--other", choices=["collective", "compute", "loader"], default="collective")
parser.add_argument("--start-method", default=None)
parser.add_argument("--catch", action="store_true", help="the failing rank catches the exception and lives on")
parser.add_argument("--fits", type=int, default=1)
parser.add_argument("--exit", type=int, nargs=2, help="what rank 0 and rank 1 end with after all of them")
parser.add_argument("--configure-model", action="store_true")
args = parser.parse_args()


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def fault(where: str) -> None:
    if args.fault == "none" or where != args.where or args.rank not in (rank(), 2):
        return
    print("FAULT", flush=True)
    if args.fault == "endless":
        return
    if args.fault == "raise":
        raise ValueError("boom")
    if args.fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        if index % 8 == 4:
            fault("loader")
        if args.other == "loader" and args.rank != rank() and index % 8 == 6:
            threading.Event().wait()
        return torch.full((4,), float(index))


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        fault("init")
        self.layer = None
        if not args.configure_model:
            self.configure_model()

    def configure_model(self):
        if self.layer is None:
            self.layer = torch.nn.Linear(4, 1)
            torch.nn.init.ones_(self.layer.weight)

    def prepare_data(self):
        fault("prepare_data")

    def setup(self, stage):
        fault("setup")

    def training_step(self, batch, index):
        if index == 2:
            fault("step")
            if args.other == "compute" and args.rank != rank():
                busy = torch.randn(200, 200)
                while True:
                    busy = torch.tanh(busy @ busy)
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        # Workers exist where a rank is to be caught waiting for one.
        return DataLoader(Rows(), batch_size=2, num_workers=1 if args.other == "loader" else 0)

    def configure_optimizers(self):
        fault("configure_optimizers")
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def faulty(name):
    def hook(self, *given, **named):
        fault(name)
        return getattr(super(Model, self), name)(*given, **named)

    return hook


for hook in set(HOOKS) - {"configure_optimizers"}:
    setattr(Model, hook, faulty(hook))


def fit() -> None:
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    strategy = LargeScaleStrategy({"dp_shard": 2}, start_method=args.start_method)
    # Rows in order on both ranks, so that the one that a loader stops at comes after the fault.
    order = {"use_distributed_sampler": False}
    epochs = -1 if args.fault == "endless" else 1
    trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=epochs, **order, **quiet)
    model = Model()
    try:
        trainer.fit(model)
    except ValueError:
        if not args.catch:
            raise
        print("CAUGHT", flush=True)
        if rank() == 1:
            # Lives until it is ended: by the others' end, or by the one who started it.
            threading.Event().wait()
        return
    trained = model.layer.weight.detach()
    moved = type(trained) is torch.Tensor and trained.shape == (1, 4) and not torch.equal(trained, torch.ones(1, 4))
    print(f"DONE rank={rank()} moved={moved} loss={'loss' in trainer.callback_metrics}\n", end="", flush=True)


for _ in range(args.fits):
    fit()
if args.exit:
    sys.exit(args.exit[rank()])
