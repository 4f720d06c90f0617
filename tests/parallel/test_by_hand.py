"""Gradients that a step takes and sets by hand, each rank having its share of the batch."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import Language, trainer
from ranks import quiet
from torch import nn

from lightning_largescale import LargeScaleStrategy, Plan
from lightning_largescale.parallel.by_hand import differentiate_leaves

pytestmark = quiet


class Marked(nn.Parameter):
    """A class of the user's."""


class ByHand(Language):
    """Two losses, each with its gradients, which are combined as no average of gradients is."""

    def __init__(self, way):
        super().__init__()
        self.automatic_optimization, self.way = False, way
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.head.weight = Marked(self.head.weight.detach())

    def training_step(self, batch, index):
        optimizer, parameters = self.optimizers(), list(self.parameters())
        x = self(batch[:, :-1])
        logits = self.head(x).flatten(0, 1) * self.temperature
        losses = nn.functional.cross_entropy(logits, batch[:, 1:].flatten()), x.square().mean()
        optimizer.zero_grad()
        getattr(self, self.way)(parameters, *losses)
        optimizer.step()
        self.losses.append(float(self.all_gather(losses[0].detach()).mean()))

    def largest(self, parameters, first, second):
        sets = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in (first, second)]
        for one, *found in zip(parameters, *sets, strict=True):
            found = [torch.zeros_like(found[0]) if gradient is None else gradient for gradient in found]
            one.grad = torch.where(found[0].abs() > found[1].abs(), *found)
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def rescaled(self, parameters, first, second):
        self.manual_backward(first, retain_graph=True)
        norms = [one.grad.norm() for one in self.parameters()]
        for one, norm in zip(self.parameters(), norms, strict=True):
            one.grad = one.grad / (norm + 1e-3)

    def inputs(self, parameters, first, second):
        """Of one layer in a block, and of one outside."""
        first.backward(inputs=[self.blocks[1].up.weight, self.head.weight])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(plan, devices, way):
    model = ByHand(way)
    trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=3).fit(model)
    return model.losses


ZERO3, ZERO2 = Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False)
QUICK = [(ZERO3, "largest"), (ZERO2, "rescaled"), (ZERO3, "inputs")]


@pytest.mark.parametrize(
    ("plan", "way"),
    [
        pytest.param(plan, way, marks=() if (plan, way) in QUICK else pytest.mark.slow)
        for plan in (ZERO3, ZERO2)
        for way in ("largest", "rescaled", "inputs")
    ],
)
def test_combined_gradients_are_those_of_all_samples(two, plan, way):
    plain = fit(None, 1, way)
    for losses in two.run(fit, plan, 2, way):
        assert losses == pytest.approx(plain, rel=1e-5)


class ThrownAway(Language):
    """The gradients of a backward that reduces nothing are cleared before those that count."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        with self.trainer.strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext():
            self.manual_backward(3 * self.loss(batch))
        assert all(one.grad is not None for one in self.parameters())
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_thrown_away(plan, devices):
    model = ThrownAway()
    trainer(LargeScaleStrategy(plan), devices=devices, max_steps=3).fit(model)
    return model.losses


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 1e-3)])
def test_gradients_that_were_not_reduced_can_be_cleared(two, precision, tolerance):
    plain = fit_thrown_away(Plan(precision=precision), 1)
    for losses in two.run(fit_thrown_away, Plan(dp_shard=2, precision=precision), 2):
        assert losses == pytest.approx(plain, rel=tolerance)


def test_gradient_edges_are_left_to_autograd():
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    undo = differentiate_leaves()
    try:
        (found,) = torch.autograd.grad(y.square().sum(), [torch.autograd.graph.get_gradient_edge(y)])
    finally:
        undo()
    assert found.tolist() == [4, 4]
