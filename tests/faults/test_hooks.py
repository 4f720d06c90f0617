"""An error in any hook of any rank: the run ends with that rank's own traceback, and the next one works."""

from __future__ import annotations

import os
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from models import Language, trainer
from ranks import quiet, ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader

from lightning_largescale import compat, hub
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

# Python 3.12 and later warn of forks where threads exist; torch's idle ones are what one thread a fork is for.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

HOOKS = (
    "setup",
    "configure_model",
    "configure_optimizers",
    "on_fit_start",
    "on_train_start",
    "train_dataloader",
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "on_train_batch_end",
    "validation_step",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
    "teardown",
)
# What is no hook of Lightning's: within the backward pass, in a worker of a loader, in a block that other ranks gather.
ELSEWHERE = ("backward", "worker", "forward")


class Worker(RandomDataset):
    def __getitem__(self, index):
        if index == 5:
            raise ValueError("boom in worker")
        return super().__getitem__(index)


class Fails(BoringModel):
    """Raises in one hook of one rank, and only in processes that were started to be ranks."""

    def __init__(self, where, rank=None):
        super().__init__()
        self.where, self.rank, self.parent = where, rank, os.getpid()

    @property
    def here(self):
        """Whether this process is to fail."""
        return self.rank is None or (os.getpid() != self.parent and self.rank == int(os.environ["LOCAL_RANK"]))

    def fault(self, where):
        if where == self.where and self.here:
            raise ValueError(f"boom in {where}")

    def forward(self, batch):
        self.fault("forward")
        output = super().forward(batch)
        if output.requires_grad:
            output.register_hook(lambda gradient: self.fault("backward"))
        return output

    def train_dataloader(self):
        self.fault("train_dataloader")
        kind, workers = (Worker, 1) if self.where == "worker" and self.here else (RandomDataset, 0)
        return DataLoader(kind(32, 64), num_workers=workers)


def faulty(name):
    def hook(self, *args, **kwargs):
        self.fault(name)
        return getattr(super(Fails, self), name)(*args, **kwargs)

    return hook


for name in set(HOOKS) - {"train_dataloader"}:
    setattr(Fails, name, faulty(name))


def run(model, folder, plan, start_method=None):
    fit = trainer(
        LargeScaleStrategy(plan, start_method=start_method),
        devices=2,
        max_epochs=1,
        max_steps=-1,
        limit_train_batches=8,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    fit.fit(model)
    return fit


@pytest.fixture
def forks(monkeypatch):
    """Ranks are forks of this session, which nothing has told of other ranks."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("MASTER_PORT", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


QUICK = ("configure_model", "optimizer_step")


def cases():
    for number, where in enumerate((*HOOKS, *ELSEWHERE)):
        for rank in (0, 1):
            marks = () if where in QUICK and rank == number % 2 else pytest.mark.slow
            yield pytest.param(where, rank, marks=marks)


@pytest.mark.parametrize(("where", "rank"), list(cases()))
def test_the_rank_that_failed_first_is_raised(forks, tmp_path, where, rank):
    with pytest.raises(ProcessRaisedException, match=f"boom in {where}") as raised:
        run(Fails(where, rank), tmp_path, Plan(dp_shard=2), "fork")
    assert raised.value.error_index == rank
    assert "gloo" not in str(raised.value)


@pytest.mark.slow
def test_the_next_fit_works_after_forks_that_failed(forks, tmp_path):
    for name, plan in (("sharded", Plan(dp_shard=2)), ("replicated", Plan(dp_replicate=2))):
        with pytest.raises(ProcessRaisedException, match="boom in training_step"):
            run(Fails("training_step", 1), tmp_path / name, plan, "fork")
        model = BoringModel()
        before = model.layer.weight.detach().clone()
        run(model, tmp_path / name, plan, "fork")
        assert not torch.equal(model.layer.weight, before)


class Clears(BoringModel):
    """Clears torch's caches in the ranks, as a fit on another mesh does."""

    def on_fit_start(self):
        compat.forget_cached_meshes()


def test_forks_keep_no_process_group_of_their_parent(forks, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,))) * 2
    dist.destroy_process_group()
    run(Clears(), tmp_path, Plan(dp_replicate=2), "fork")


def raise_and_train(where, folder, plan):
    """Ranks that all raise alike, whose caller goes on."""
    with pytest.raises(ValueError, match=f"boom in {where}"):
        run(Fails(where), folder, plan)
    assert dist.is_initialized()
    after = Language()
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=3).fit(after)
    return after.losses


@pytest.mark.parametrize("plan", [Plan(dp_shard=2), Plan(dp_replicate=2)], ids=["ZeRO-3", "replicate"])
@pytest.mark.parametrize("where", ["configure_optimizers", "training_step", "backward", "on_save_checkpoint"])
def test_the_next_fit_works_after_ranks_that_raised_alike(two, tmp_path, where, plan):
    trainer(max_steps=3).fit(expected := Language())
    for losses in two.run(raise_and_train, where, tmp_path, plan):
        assert losses == pytest.approx(expected.losses, rel=1e-5)


class FailsAfter(Fails):
    """Raises once the file `after` exists."""

    def __init__(self, after):
        super().__init__("configure_optimizers")
        self.after = after

    def configure_optimizers(self):
        while not self.after.exists():
            time.sleep(0.01)
        return super().configure_optimizers()


def fail_apart_and_train(folder, last):
    """Twice, so that both have left the group and meet again, the first before the last has left."""
    hub.TOGETHER_SECONDS = 0.0  # the ranks are this test's own
    here = int(os.environ["RANK"])
    plan = Plan(dp_shard=2)
    for left in (folder / "once", folder / "twice"):
        with pytest.raises(ValueError, match="boom in configure_optimizers"):
            run(FailsAfter(left) if here == last else Fails("configure_optimizers"), folder, plan)
        assert not dist.is_initialized()
        # Late, so that this rank asks for the next group while the last is still in this one.
        threading.Timer(1.0, left.touch).start()
    after = Language()
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=3).fit(after)
    return after.losses


@pytest.mark.parametrize("last", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_that_raised_one_after_another_meet_again(tmp_path, last):
    with ranks(2) as own:
        found = own.run(fail_apart_and_train, tmp_path, last)
    trainer(max_steps=3).fit(expected := Language())
    for losses in found:
        assert losses == pytest.approx(expected.losses, rel=1e-5)


def fail_unconnected(folder):
    """A second fit, in which rank 0 alone fails before the ranks have met again and saves what it has; then a third."""
    warnings.filterwarnings("ignore", message=".*fit.ckpt_path=")  # whenever there is this callback
    plan = Plan(dp_replicate=2)
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(Language())
    failing = Language()
    if os.environ["RANK"] == "0":
        failing.configure_callbacks = lambda: 1 / 0
    saving = {"enable_checkpointing": True, "callbacks": [OnExceptionCheckpoint(folder)]}
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        trainer(LargeScaleStrategy(plan), devices=2, max_steps=1, **saving).fit(failing)
    after = Language()
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=3).fit(after)
    return after.losses


def test_a_rank_that_fails_before_the_ranks_have_met_again(tmp_path):
    with ranks(2) as own:
        found = own.run(fail_unconnected, tmp_path)
    trainer(max_steps=3).fit(expected := Language())
    for losses in found:
        assert losses == pytest.approx(expected.losses, rel=1e-5)
