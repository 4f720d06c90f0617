"""SLURM tells ranks at different places of their steps that time is up: a checkpoint is saved, the job requeued."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from models import CONTEXT, Language, Tokens, trainer
from ranks import quiet
from torch.utils.data import DataLoader

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

STEPS, EPOCHS = 4, 2


class Batches:
    """This rank's part of each global batch of 8, going on in the midst of an epoch where it was saved."""

    def __init__(self, rank=0, num_replicas=1, batches=STEPS):
        self.rank, self.ranks, self.batches, self.done = rank, num_replicas, batches, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        data = Tokens()
        for number in range(self.done, self.batches):
            self.done = (number + 1) % self.batches
            yield torch.stack([data[8 * number + one] for one in range(self.rank, 8, self.ranks)])

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Signalled(Language):
    """Signals its own process where it is told to: (hook, batch) by rank, in the first epoch.

    Args:
        places: of ranks that are signalled.
        number: the signal.
        batches: to validate on, by rank.
    """

    def __init__(self, places=None, number=signal.SIGUSR1, batches=(2, 2), **options):
        super().__init__(**options)
        self.places, self.number, self.batches = places or {}, number, batches
        self.steps = []

    def here(self, hook, index=None):
        trainer = self.trainer
        if trainer.sanity_checking or trainer.current_epoch:
            return
        if self.places.get(trainer.global_rank) == (hook, index):
            os.kill(os.getpid(), self.number)

    def training_step(self, batch, index):
        self.here("training_step", index)
        return super().training_step(batch, index)

    def on_before_zero_grad(self, optimizer):
        self.here("zero_grad", self.trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_end(self, output, batch, index):
        self.here("on_train_batch_end", index)
        self.steps.append(self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_start(self):
        self.here("on_train_epoch_start")

    def on_train_epoch_end(self):
        self.here("on_train_epoch_end")

    def on_validation_epoch_end(self):
        self.here("on_validation_epoch_end")

    def validation_step(self, batch, index):
        self.here("validation_step", index)
        loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)
        return loss

    def train_dataloader(self):
        return Batches(**self.trainer.distributed_sampler_kwargs or {})

    def val_dataloader(self):
        batches = self.batches[self.trainer.global_rank]
        among = self.trainer.distributed_sampler_kwargs or {}
        return DataLoader([*Batches(**among, batches=batches)], batch_size=None)


def on_slurm(patch, folder, ranks):
    """The variables of a job, and an `scontrol` that writes down what it is told."""
    tool = folder / "scontrol"
    if not tool.exists():
        tool.write_text(f'#!/bin/sh\necho "$@" >> {folder / "requeued"}\n')
        tool.chmod(0o755)
    rank = os.environ.get("RANK", "0")
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": ranks, "NTASKS_PER_NODE": ranks, "NNODES": 1}
    job |= {"NODELIST": "127.0.0.1", "NODEID": 0, "PROCID": rank, "LOCALID": rank}
    for name, value in job.items():
        patch.setenv(f"SLURM_{name}", str(value))
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def train(folder, plan, ranks, places=None, *, path=None, auto_requeue=True, requeue_signal=None, **options):
    """Train as a task of SLURM."""
    number = requeue_signal or signal.SIGUSR1
    model = Signalled(places, number, **options)
    with pytest.MonkeyPatch.context() as patch:
        on_slurm(patch, folder, ranks)
        environment = SLURMEnvironment(auto_requeue=auto_requeue, requeue_signal=requeue_signal)
        run = trainer(
            LargeScaleStrategy(plan, sample_batch=torch.zeros(8, CONTEXT + 1, dtype=torch.int64)),
            devices=ranks,
            max_steps=-1,
            max_epochs=EPOCHS,
            limit_val_batches=1.0,
            num_sanity_val_steps=1,
            plugins=[environment],
            default_root_dir=folder,
        )
        before = signal.getsignal(number)
        ended = False
        try:
            run.fit(model, ckpt_path=path, weights_only=False)
        except SystemExit:
            ended = True
        assert signal.getsignal(number) == before
    return model.losses, model.steps, ended


@pytest.fixture(scope="module")
def expected():
    trainer(max_steps=-1, max_epochs=EPOCHS).fit(model := Signalled())
    return model.losses


def check_requeued(ranks, folder, plan, places, expected, *, left, ends=False, **options):
    """All go on as if nothing had been, one checkpoint is there, and training goes on from it to the same losses.

    Args:
        left: the steps that follow the checkpoint.
        ends: whether the signal ends training, too.
    """
    size = plan.world_size
    call = ranks.run if size > 1 else lambda function, *args, **named: [function(*args, **named)]
    for losses, _, ended in call(train, folder, plan, size, places, **options):
        assert losses == pytest.approx(expected[: len(expected) - left] if ends else expected, rel=1e-5)
        assert ended == ends
    assert [path.name for path in folder.glob("*hpc_ckpt*")] == ["hpc_ckpt_1.ckpt"]
    assert (folder / "requeued").read_text() == "requeue 7\n"
    for losses, steps, _ in call(train, folder, plan, size, path=folder / "hpc_ckpt_1.ckpt"):
        assert losses == pytest.approx(expected[len(expected) - left :], rel=1e-5)
        assert steps == [*range(len(expected) - left, len(expected))]


PLANS = {
    "sharded": Plan(dp_shard=2),
    "replicated": Plan(dp_replicate=2),
    "divided": Plan(tp=2),
    "offloaded": Plan(offload_parameters="cpu"),
    "plain": Plan(),
}


QUICK = ("sharded", "replicated", "between epochs", "validation", signal.SIGTERM)


def cases(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("plan", cases(PLANS))
def test_at_different_places_of_a_step(two, tmp_path, expected, plan):
    places = {0: ("zero_grad", 1), 1: ("training_step", 2)}
    check_requeued(two, tmp_path, PLANS[plan], places, expected, left=6)


PLACES = {
    "one rank alone": ({1: ("on_train_batch_end", 0)}, 7),
    "another step": ({0: ("training_step", 0), 1: ("training_step", 2)}, 7),
    "between epochs": ({0: ("on_train_epoch_end", None), 1: ("on_train_epoch_end", None)}, 4),
    "first batch": ({0: ("on_train_epoch_start", None)}, 8),
    "validation": ({0: ("validation_step", 0), 1: ("validation_step", 1)}, 4),
    "end of validation": ({0: ("on_validation_epoch_end", None)}, 4),
}


@pytest.mark.parametrize("places", cases(PLACES))
def test_wherever_the_ranks_are(two, tmp_path, expected, places):
    found, left = PLACES[places]
    check_requeued(two, tmp_path, PLANS["sharded"], found, expected, left=left)


@pytest.mark.parametrize("plan", [pytest.param("sharded", marks=pytest.mark.slow), "replicated"])
def test_where_a_rank_has_no_batches_left(two, tmp_path, expected, plan):
    places = {1: ("validation_step", 2)}
    check_requeued(two, tmp_path, PLANS[plan], places, expected, left=4, batches=(1, 3))


@pytest.mark.parametrize("number", cases([signal.SIGUSR2, signal.SIGTERM]))
def test_another_signal(two, tmp_path, expected, number):
    places, ends = {0: ("training_step", 1), 1: ("zero_grad", 1)}, number == signal.SIGTERM
    check_requeued(two, tmp_path, PLANS["sharded"], places, expected, left=6, ends=ends, requeue_signal=number)


def evaluate(folder, stage):
    """Evaluate on fewer batches on rank 0, signalled on rank 1 before these end there, or after."""
    with pytest.MonkeyPatch.context() as patch:
        on_slurm(patch, folder, 2)
        found = []
        for batches, index in (((2, 3), 0), ((1, 3), 2)):
            model = Signalled({1: ("validation_step", index)}, batches=batches)
            model.test_dataloader = model.predict_dataloader = model.val_dataloader
            model.test_step = model.predict_step = model.validation_step
            options = {"plugins": [SLURMEnvironment()], "default_root_dir": folder}
            run = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, limit_val_batches=1.0, **options)
            # What is logged while predicting is refused.
            model.log = lambda *args, **kwargs: None
            getattr(run, stage)(model)
            found.append(len([*folder.glob("hpc_ckpt*")]))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone(two, tmp_path, stage):
    assert two.run(evaluate, tmp_path, stage) == [[1, 2]] * 2
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 2


def train_with_own_handler(folder):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        return *train(folder, Plan(dp_shard=2), 2, {1: ("training_step", 1)}, auto_requeue=False), received
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_auto_requeue_the_signal_is_the_users(two, tmp_path, expected):
    for rank, (losses, _, _, received) in enumerate(two.run(train_with_own_handler, tmp_path)):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert received == [signal.SIGUSR1] * rank
    assert [path.name for path in tmp_path.iterdir()] == ["scontrol"]
