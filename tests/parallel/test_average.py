"""Averages over ranks: of half-precision numbers whose sum is none."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from models import trainer
from ranks import mesh_of, quiet
from torch import nn
from torch.utils.data import DataLoader

from lightning_largescale import LargeScaleStrategy, Plan
from lightning_largescale.parallel.average import Average, average_in_place
from lightning_largescale.techniques.replicate.averaging import Seen, average_gradients

pytestmark = quiet

# Two of these are more than the largest number of float16.
LARGE = 4e4


def averages():
    mesh = mesh_of((2, 1))
    rank = mesh.get_local_rank("dp_shard")
    large = torch.full((3,), LARGE, dtype=torch.float16)
    in_place = torch.tensor([rank, 2.0 * rank])
    average_in_place(in_place)
    dense = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    dense.grad = large.clone()
    average_gradients([(dense, Seen.TRAINABLE | Seen.DENSE)])
    average = Average(mesh)
    (each, none) = average.each([large, None], [large, large])
    return average(large), each, none, in_place, dense.grad


def test_of_large_halves(two):
    for whole, each, none, in_place, dense in two.run(averages):
        assert whole.tolist() == each.tolist() == dense.tolist() == [LARGE] * 3
        assert none is None
        assert in_place.tolist() == [0.5, 1.0]


class Steep(LightningModule):
    """The gradient of one parameter is large.

    Args:
        kind: "scalar", which no group divides; "full_parameters", in a loss of these; "grad", taken by hand.
    """

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
        self.own = nn.Parameter(torch.tensor(0.5) if kind == "scalar" else torch.full((4,), 0.5))
        self.kind, self.automatic_optimization = kind, kind != "grad"

    @property
    def steep(self):
        return self.blocks[0].bias if self.kind == "full_parameters" else self.own

    def training_step(self, batch, _):
        smooth = self.blocks(batch.half()).mean()
        if self.kind == "full_parameters":
            with self.trainer.strategy.full_parameters():
                return smooth + self.steep.sum() * LARGE
        loss = smooth + self.steep.sum() * LARGE
        if self.kind == "grad":
            (self.steep.grad,) = torch.autograd.grad(loss, [self.steep])
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-5)

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 4), batch_size=2)


def steps(plan, devices, kind):
    model = Steep(kind)
    trainer(LargeScaleStrategy(plan), devices=devices, max_steps=2).fit(model)
    steep = model.steep.detach()
    return getattr(steep, "full_tensor", lambda: steep)()


@pytest.mark.parametrize("kind", ["scalar", "full_parameters", "grad"])
def test_half_precision_trains_on_large_gradients(two, kind):
    expected = steps(Plan(precision="16-true"), 1, kind)
    assert expected.isfinite().all()
    for steep in two.run(steps, Plan(dp_shard=2, precision="16-true"), 2, kind):
        torch.testing.assert_close(steep, expected, rtol=1e-3, atol=0)
