"""Ranks with unequal numbers of batches: every sample is evaluated once, epochs end together, nobody waits for ever."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from models import Language, Tokens, trainer
from ranks import quiet
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_largescale.errors import PlanError
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


PLANS = [Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False), Plan(dp_replicate=2)]


@pytest.mark.parametrize("plan", PLANS)
def test_every_sample_is_predicted_once(two, plan):
    assert two.run(predict, plan, 5) == [(3, [3, 1]), (2, [2, 1])]
    assert two.run(predict, plan, 8) == [(3, [4, 1]), (3, [4, 1])]


class Stream(IterableDataset):
    """`counts[rank]` samples on each rank, which nobody knows before."""

    def __init__(self, counts):
        self.counts = counts

    def __iter__(self):
        rank = torch.distributed.get_rank()
        for index in range(self.counts[rank]):
            yield Tokens()[sum(self.counts[:rank]) + index]


class Shares(list):
    """A sampler that deals ranks unequal shares, known before."""

    def __init__(self, counts):
        rank = torch.distributed.get_rank()
        super().__init__(range(sum(counts[:rank]), sum(counts[: rank + 1])))


def loader(kind, counts):
    if kind == "stream":
        return DataLoader(Stream(counts), batch_size=1)
    return DataLoader(Tokens(), batch_size=1, sampler=Shares(counts))


class Evaluating(Language):
    """Counts each sample by a metric that is synchronised over ranks."""

    def __init__(self):
        super().__init__()
        self.metric, self.total, self.steps = MeanMetric(), MeanMetric(), 0

    def validation_step(self, batch, index, dataloader_idx=0):
        self.steps += 1
        loss = self.loss(batch)
        self.metric(loss)
        self.log("metric", self.metric, on_epoch=True, add_dataloader_idx=False)
        self.log("mean", loss, sync_dist=True, batch_size=len(batch), add_dataloader_idx=False)

    def test_step(self, batch, index, dataloader_idx=0):
        self.validation_step(batch, index)


def evaluate(plan, kind, counts, method):
    model = Evaluating()
    run = trainer(LargeScaleStrategy(plan), devices=2, limit_val_batches=1.0)
    getattr(run, method)(model, dataloaders=loader(kind, counts), verbose=False)
    return model.steps, float(run.callback_metrics["metric"])


def evaluate_all(count):
    model = Evaluating()
    run = trainer(limit_val_batches=1.0)
    run.validate(model, dataloaders=DataLoader(Tokens(count), batch_size=1), verbose=False)
    return float(run.callback_metrics["metric"])


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        pytest.param(plan, kind, marks=() if kind == quick else pytest.mark.slow)
        for plan, quick in zip(PLANS, ("stream", "shares", "stream"), strict=True)
        for kind in ("stream", "shares")
    ],
)
def test_every_sample_is_evaluated_once(two, plan, kind):
    metric = evaluate_all(6)
    for method, counts in (("validate", [4, 2]), ("test", [1, 5])):
        answers = two.run(evaluate, plan, kind, counts, method)
        assert [steps for steps, _ in answers] == counts
        assert [found for _, found in answers] == [pytest.approx(metric, rel=1e-5)] * 2


def predict_stream(plan, counts):
    model = Predicting()
    predicted = trainer(LargeScaleStrategy(plan), devices=2).predict(model, loader("stream", counts))
    return model.steps, len(predicted)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[2]])
def test_a_rank_without_any_batch(two, plan):
    assert two.run(predict_stream, plan, [2, 0]) == [(2, 2), (0, 0)]
    with pytest.raises(PlanError, match=r"another rank has no batch to evaluate, .* give every rank at least one"):
        two.run(evaluate, plan, "stream", [3, 0], "validate")


class Counting(Language):
    """Counts what it is trained on."""

    def __init__(self):
        super().__init__()
        self.trained, self.epochs = 0, []

    def training_step(self, batch, index):
        self.trained += 1
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_train_epoch_end(self):
        self.epochs.append((self.trained, self.trainer.global_step, self.trainer.fit_loop.epoch_loop._is_training_done))


def fit_uneven(plan, kind, counts, accumulate):
    model = Counting()
    run = trainer(
        LargeScaleStrategy(plan),
        devices=2,
        max_steps=-1,
        max_epochs=2,
        limit_val_batches=1.0,
        accumulate_grad_batches=accumulate,
    )
    says = pytest.warns(UserWarning, match="give all ranks the same number to train on all")
    with says if run.is_global_zero else contextlib.nullcontext():
        run.fit(model, loader(kind, counts), loader(kind, [2, 1]))
    return model.epochs, run.global_step, float(run.callback_metrics["val_loss"])


@pytest.mark.parametrize("kind", ["stream", pytest.param("shares", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", PLANS)
def test_an_epoch_of_training_ends_on_all_ranks_together(two, plan, kind):
    for counts, accumulate in (([5, 3], 1), ([3, 4], 2)):
        first, second = two.run(fit_uneven, plan, kind, counts, accumulate)
        assert first == second
        steps = -(-3 // accumulate)
        assert first[:2] == ([(3, steps, True), (6, 2 * steps, True)], 2 * steps)


class Asking(Language):
    """Asks for the number of steps before the strategy is set up, which has Lightning make the loaders."""

    def __init__(self, kind, counts):
        super().__init__()
        self.kind, self.counts = kind, counts

    def train_dataloader(self):
        return loader(self.kind, self.counts)

    def setup(self, stage):
        self.steps = self.trainer.estimated_stepping_batches

    def on_train_batch_start(self, batch, index):
        return -1


def steps_before_setup(plan, kind, counts):
    model = Asking(kind, counts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ranks have")
        trainer(LargeScaleStrategy(plan), devices=2, max_epochs=1, max_steps=-1).fit(model)
    return model.steps


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[2]])
def test_loaders_that_are_made_before_setup_are_as_long_on_all_ranks(two, plan):
    assert two.run(steps_before_setup, plan, "shares", [5, 3]) == [3, 3]


class Stateful:
    """A loader that is saved with the loop."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        while self.at < 8 + rank:
            self.at += 1
            yield torch.stack([Tokens()[self.at]])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def save_and_resume(plan, devices, path):
    path = f"{path}/{devices}.ckpt"
    trained = []
    for steps, checkpoint in ((2, None), (20, path)):
        model = Counting()
        run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=steps, max_epochs=1)
        run.fit(model, Stateful(), ckpt_path=checkpoint)
        run.save_checkpoint(path)
        trained.append(model.trained)
    return trained


@pytest.mark.filterwarnings("ignore:A rank has no more batches")
def test_the_state_of_an_uneven_loader_is_saved(two, tmp_path):
    first, second = save_and_resume(None, 1, tmp_path)
    assert second < 8
    for trained in two.run(save_and_resume, PLANS[0], 2, tmp_path):
        assert trained == [first, second]


class Boasting(list):
    """Promises more batches than it has."""

    def __len__(self):
        return super().__len__() + 1 + torch.distributed.get_rank()


def fit_boasting():
    batches = Boasting(DataLoader(Tokens(4), batch_size=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ranks have")
        trainer(LargeScaleStrategy(PLANS[2]), devices=2, max_epochs=1, max_steps=-1).fit(Language(), Plain(batches))


class Plain:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def test_a_loader_that_promises_more_than_it_has(two):
    with pytest.raises(RuntimeError, match=r"Plain promised 3 batches and has 2; its `__len__` must give"):
        two.run(fit_boasting)
