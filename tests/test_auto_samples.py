"""The auto strategy and the loader: tensor parallelism only where its ranks are given the same samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from ranks import quiet
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_largescale import step_tracer
from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*does not have many workers")]

ROWS, WIDTH, BATCH = 64, 256, 16


def row(index):
    return torch.full((WIDTH,), index / ROWS)


class Rows(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return row(index)


class Stream(IterableDataset):
    """Every `step`-th row from the `first` on."""

    def __init__(self, first=0, step=1):
        self.first, self.step = first, step

    def __iter__(self):
        return map(row, range(self.first, ROWS, self.step))


class Wide(LightningModule):
    """Has many parameters and few samples: at these rates its gradients cost more than its activations."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.seen, self.asked = kind, [], 0
        wide = 8 * WIDTH
        self.trunk = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH)) for _ in range(2))
        )
        self.head = nn.Linear(WIDTH, 1)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append((batch[:, 0] * ROWS).round().int().tolist())

    def training_step(self, batch, batch_idx):
        return self.head(self.trunk(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self):
        self.asked += 1
        world, rank = self.trainer.world_size, self.trainer.global_rank
        if self.kind == "sampler of the ranks":
            return DataLoader(Rows(), BATCH // world, sampler=DistributedSampler(Rows(), world, rank, shuffle=False))
        if self.kind == "sampler of the strategy":
            told = self.trainer.distributed_sampler_kwargs
            return DataLoader(Rows(), BATCH, sampler=DistributedSampler(Rows(), **told, shuffle=False))
        if self.kind == "stream of the ranks":
            return DataLoader(Stream(rank, world), BATCH // world)
        if self.kind == "stream":
            return DataLoader(Stream(), BATCH)
        return DataLoader(Rows(), BATCH)


def fit(kind, **options):
    torch.manual_seed(0)
    module = Wide(kind)
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    run = Trainer(accelerator="cpu", devices=2, strategy=LargeScaleAutoStrategy(), **options)
    run.fit(module)
    report = run.strategy.report
    return run.strategy.plan.tp, module.seen, module.asked, report.workload.approximate


@pytest.mark.parametrize("kind", ["Lightning's sampler", "sampler of the strategy", "stream"])
def test_ranks_that_are_given_the_same_samples_may_divide_the_model(two, kind):
    (tp, seen, asked, told), other = two.run(fit, kind)
    assert tp == 2
    assert not any("tensor parallelism" in note for note in told)
    assert seen == other[1]
    assert sorted(itertools.chain.from_iterable(seen)) == [*range(ROWS)]
    assert asked <= 2


@pytest.mark.parametrize("kind", ["sampler of the ranks", "stream of the ranks"])
def test_ranks_that_are_given_their_own_samples_do_not(two, kind):
    (tp, seen, asked, told), other = two.run(fit, kind)
    assert tp == 1
    assert "tensor parallelism is left out, since the loader gives each rank samples of its own" in told
    assert sorted(itertools.chain.from_iterable(seen + other[1])) == [*range(ROWS)]
    assert asked <= 2


def fit_looking_here(kind):
    """As where a fork cannot look at the step, so that the loader that the run is given is looked at twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_tracer, "can_run_apart", lambda: False)
        return fit(kind, max_epochs=3, reload_dataloaders_every_n_epochs=1)


@pytest.mark.parametrize("kind", ["Lightning's sampler", "stream", "sampler of the ranks", "stream of the ranks"])
def test_a_loader_that_was_looked_at_is_asked_for_anew_in_each_epoch(two, kind):
    (_, seen, asked, _), other = two.run(fit_looking_here, kind)
    assert asked == 3
    rows = seen if seen == other[1] else seen + other[1]
    assert sorted(itertools.chain.from_iterable(rows)) == sorted([*range(ROWS)] * 3)


class Words(IterableDataset):
    """Text of every `step`-th row, which the step makes numbers of."""

    def __init__(self, first, step):
        self.first, self.step = first, step

    def __iter__(self):
        return map(str, range(self.first, ROWS, self.step))


class Reads(Wide):
    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append([int(word) for word in batch])

    def training_step(self, batch, batch_idx):
        return super().training_step(torch.stack([row(int(word)) for word in batch]), batch_idx)

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(Words(rank, world), BATCH // world)


def read(plan=None):
    torch.manual_seed(0)
    module = Reads("words")
    strategy = LargeScaleAutoStrategy() if plan is None else LargeScaleStrategy(plan)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, **options)
    run.fit(module)
    return run.strategy.plan.tp, module.seen


def test_text_is_compared_too(two):
    (tp, seen), other = two.run(read)
    assert tp == 1
    assert sorted(itertools.chain.from_iterable(seen + other[1])) == [*range(ROWS)]
    with pytest.raises(PlanError, match="were given different batches"):
        two.run(read, Plan(tp=2))
