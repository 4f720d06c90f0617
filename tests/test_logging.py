"""What a run logs: values over all ranks, torchmetrics, gathered tensors, and loggers that write once."""

from __future__ import annotations

import csv
import os
from functools import cache

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from models import GLOBAL_BATCH, VOCAB, Language, Tokens, trainer
from ranks import quiet
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = {
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
}
STEPS = 4
VALIDATION_BATCHES = 5


def strategy(plan):
    return LargeScaleStrategy(plan) if plan else "auto"


class Logs(Language):
    """Logs the same numbers however the global batch is divided, as values and as metric objects."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.mean, self.val_mean = MeanMetric(), MeanMetric()
        self.metrics = MetricCollection({"accuracy": MulticlassAccuracy(VOCAB, average="micro")})
        self.val_metrics = self.metrics.clone(prefix="val_")
        self.steps: list[dict[str, float]] = []

    def training_step(self, batch, index):
        logits = self.head(self(batch[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("tokens", batch.sum().float(), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log_dict({"most": batch[:, 0].max().float()}, on_step=False, on_epoch=True, sync_dist=True, reduce_fx=max)
        self.log("least", batch[:, 0].min().float(), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="min")
        self.mean(loss)
        self.metrics(logits.argmax(-1), batch[:, 1:])
        self.log("mean_metric", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *args):
        self.steps.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def validation_step(self, batch, index):
        logits = self.head(self(batch[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.val_metrics.update(logits.argmax(-1), batch[:, 1:])
        self.val_mean.update(loss, weight=len(batch))
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch))
        self.log("val_most", batch.max().float(), sync_dist=True, reduce_fx="max")
        self.log("val_mean", self.val_mean)
        self.log_dict(self.val_metrics)

    def val_dataloader(self):
        """Whole batches divided: with an odd number of them one rank has one more."""
        mine = range(self.trainer.global_rank, VALIDATION_BATCHES, self.trainer.world_size)
        batches = [list(range(GLOBAL_BATCH * batch, GLOBAL_BATCH * (batch + 1))) for batch in mine]
        return DataLoader(Tokens(), batch_sampler=batches)


def logged(plan, devices):
    """The numbers after each step and at the end of the epoch, those of validation among them."""
    model = Logs()
    options = {"max_steps": STEPS, "limit_train_batches": STEPS, "limit_val_batches": 1.0}
    run = trainer(strategy(plan), devices=devices, num_sanity_val_steps=0, log_every_n_steps=1, **options)
    run.fit(model)
    return model.steps, {name: float(value) for name, value in run.callback_metrics.items()}


@cache
def plain():
    return logged(None, 1)


@pytest.mark.parametrize("plan", PLANS)
def test_values_and_metrics_are_those_of_the_global_batch(two, plan):
    steps, final = plain()
    for found_steps, found in two.run(logged, PLANS[plan], 2):
        for mine, expected in zip([*found_steps, found], [*steps, final], strict=True):
            # A metric object's value of a step is this rank's own, unless it is asked for the others'.
            for values in (mine, expected):
                values.pop("mean_metric_step", None)
                if "mean_metric_epoch" not in values:
                    values.pop("mean_metric", None)
            assert mine == pytest.approx(expected, rel=1e-4)
    assert {"loss_step", "loss_epoch", "tokens_epoch", "most", "least", "mean_metric_epoch"} <= final.keys()
    assert {"accuracy", "val_loss", "val_most", "val_mean", "val_accuracy"} <= final.keys()


class Contrasts(Language):
    """Features of all ranks in one loss, as contrastive learning has them."""

    def training_step(self, batch, index):
        features = self(batch[:, :-1]).mean(1)
        everyone = self.all_gather(features, sync_grads=True).reshape(-1, features.shape[-1])
        similar = torch.nn.functional.normalize(everyone) @ torch.nn.functional.normalize(everyone).T
        silent = self.all_gather({"features": features.detach(), "name": "x"})
        assert silent["features"].numel() == everyone.numel()
        assert not silent["features"].requires_grad
        # That of the rank's own part has the gradients of a mean, that of the whole those of the whole.
        loss = super().training_step(batch, index) + similar.logsumexp(1).mean()
        self.losses[-1] = float(self.all_gather(loss.detach()).mean())
        return loss


def contrast(plan, devices):
    model = Contrasts()
    trainer(strategy(plan), devices=devices, max_steps=6).fit(model)
    return model.losses


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_go_through_what_is_gathered(two, plan):
    expected = contrast(None, 1)
    for losses in two.run(contrast, PLANS[plan], 2):
        assert losses == pytest.approx(expected, rel=1e-5)


def exchange(strategy):
    """What the strategy's collectives answer, to types of all kinds."""
    run = trainer(strategy, devices=2)
    talk = run.strategy
    talk.setup_environment()
    rank = talk.global_rank
    number = torch.tensor([float(rank), 3.0])
    objects = [{"a": number, "b": [rank]}, rank, True, None, "word"]
    operations = ["mean", "avg", "sum", "max", "min", torch.distributed.ReduceOp.MAX, None]
    found = {f"broadcast {index}": talk.broadcast(thing) for index, thing in enumerate(objects)}
    found |= {f"from 1 {index}": talk.broadcast(thing, src=1) for index, thing in enumerate(objects)}
    found |= {f"reduce {index}": talk.reduce(thing) for index, thing in enumerate(objects)}
    for operation in operations:
        for tensor in (number, torch.tensor(rank + 1), torch.tensor([1, 2 * rank]), torch.tensor(rank == 0)):
            try:
                found[f"{operation} {tensor}"] = talk.reduce(tensor.clone(), reduce_op=operation)
            except Exception as error:
                found[f"{operation} {tensor}"] = (type(error), str(error).partition("\n")[0])
    for everyone in (True, False):
        for decisions in ((True, True), (True, False), (False, True), (False, False)):
            found[f"{everyone} {decisions}"] = talk.reduce_boolean_decision(decisions[rank], all=everyone)
    for tensor in (number, torch.tensor(rank), torch.tensor(rank == 0), torch.zeros(2, 0)):
        found[f"gather {tensor}"] = talk.all_gather(tensor)
    found["barrier"] = talk.barrier("here")
    talk.teardown()
    return {name: (type(value), repr(value)) for name, value in found.items()}


def test_ranks_talk_as_under_ddp(two):
    assert two.run(exchange, LargeScaleStrategy(Plan(dp_shard=2))) == two.run(exchange, "ddp")


def write(plan, devices, folder, kind):
    model = Logs()
    logger = kind(folder, name="run", version=0)
    options = {"max_steps": STEPS, "limit_train_batches": STEPS, "limit_val_batches": 2}
    run = trainer(
        strategy(plan), devices=devices, num_sanity_val_steps=0, log_every_n_steps=1, logger=logger, **options
    )
    run.fit(model)
    return run.log_dir


@pytest.mark.parametrize("plan", ["replicate", "ZeRO-3"])
def test_csv_is_written_once(two, tmp_path, plan):
    write(None, 1, tmp_path / "plain", CSVLogger)
    folders = two.run(write, PLANS[plan], 2, tmp_path / "ours", CSVLogger)
    folder = tmp_path / "ours" / "run" / "version_0"
    assert folders == [str(folder)] * 2
    assert {"metrics.csv", "hparams.yaml"} <= set(os.listdir(folder))
    rows, expected = (
        list(csv.DictReader((tmp_path / name / "run" / "version_0" / "metrics.csv").read_text().splitlines()))
        for name in ("ours", "plain")
    )
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [float(row["loss_step"]) for row in rows if row["loss_step"]] == pytest.approx(
        [float(row["loss_step"]) for row in expected if row["loss_step"]], rel=1e-4
    )
    kept = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert kept["largescale"]["dp_shard"] == PLANS[plan].dp_shard


def test_tensorboard_is_written_once(two, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    (folder, _) = two.run(write, PLANS["ZeRO-3"], 2, tmp_path, TensorBoardLogger)
    assert len([name for name in os.listdir(folder) if "tfevents" in name]) == 1
    read = events.EventAccumulator(folder)
    read.Reload()
    assert [event.step for event in read.Scalars("loss_step")] == list(range(STEPS))
