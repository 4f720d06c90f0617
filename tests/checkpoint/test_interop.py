"""Checkpoints of stock Lightning, its ModelParallelStrategy and ours, read by each other: model, optimizer, loops."""

from __future__ import annotations

import os

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from models import GLOBAL_BATCH, Language, SaveLast, trainer
from ranks import quiet
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

STEPS = 3


class Shared(Language):
    """Shards itself where Lightning's strategy asks it to, with a head that is the embedding."""

    def __init__(self, *, grouped=True, **options):
        super().__init__(samples=STEPS * GLOBAL_BATCH, tied=True, **options)
        self.grouped = grouped

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for block in self.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            # What it holds itself is gathered by no forward.
            self.position = nn.Parameter(self.position.detach(), requires_grad=False)
            fully_shard(self, mesh=self.device_mesh["data_parallel"], ignored_params={self.position})

    def configure_optimizers(self):
        self.position.requires_grad_(False)
        vectors = [one for one in self.parameters() if one.dim() < 2]
        matrices = [one for one in self.parameters() if one.dim() > 1 and one.requires_grad]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
        # Of a file, ModelParallelStrategy takes the state of parameters in the module's order.
        optimizer = AdamW(groups if self.grouped else self.parameters(), lr=self.lr)
        return [optimizer], [StepLR(optimizer, 1, 0.7)]

    def forward(self, tokens):
        return self.head(super().forward(tokens))

    def loss(self, batch):
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def strategy_of(kind):
    if kind == "stock":
        return "auto", 1
    if kind.startswith("parallel"):
        directory = kind == "parallel directory"
        parallel = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=directory
        )
        return parallel, 2
    if kind == "ours plain":
        return LargeScaleStrategy(Plan()), 1
    return LargeScaleStrategy(Plan(dp_shard=2), save_full=kind == "ours file"), 2


def part(kind, epochs, path=None, save=None, *, grouped=True):
    strategy, devices = strategy_of(kind)
    model = Shared(grouped=grouped, seed=0 if path is None else 7 + int(os.environ.get("RANK", 0)))
    made = trainer(
        strategy, devices=devices, max_steps=-1, max_epochs=epochs, callbacks=[SaveLast(save)] if save else []
    )
    made.fit(model, ckpt_path=path, weights_only=False)
    assert made.global_step == epochs * STEPS
    return model.losses


def run_on(two, kind, *args, **options):
    if strategy_of(kind)[1] == 1:
        return part(kind, *args, **options)
    return two.run(part, kind, *args, **options)[0]


@pytest.fixture(scope="module")
def uninterrupted():
    return {grouped: part("stock", 2, grouped=grouped) for grouped in (True, False)}


CASES = [
    ("stock", "ours directory"),
    ("parallel directory", "ours directory"),
    pytest.param("parallel directory", "ours plain", marks=pytest.mark.slow),
    pytest.param("parallel file", "ours directory", marks=pytest.mark.slow),
    ("ours directory", "parallel directory"),
    ("ours directory", "stock"),
    pytest.param("ours file", "parallel directory", marks=pytest.mark.slow),
    pytest.param("ours file", "stock", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("writer", "reader"), CASES)
def test_reads_what_another_wrote(two, uninterrupted, tmp_path, writer, reader):
    grouped = (writer, reader) != ("ours file", "parallel directory")
    losses, path = uninterrupted[grouped], str(tmp_path / "a.ckpt")
    before = run_on(two, writer, 1, None, path, grouped=grouped)
    assert before == pytest.approx(losses[:STEPS], rel=1e-5)
    assert run_on(two, reader, 2, path, grouped=grouped) == pytest.approx(losses[STEPS:], rel=1e-5)
