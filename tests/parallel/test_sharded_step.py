"""Steps of a sharded module: backward inside of them, forward between backward and step, accumulation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lightning.pytorch import LightningModule
from models import Language, trainer
from ranks import quiet
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = [Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False), Plan(dp_replicate=2)]


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, outputs),
    )


class Adversarial(LightningModule):
    """Two networks with an optimizer each, stepped by hand one after the other."""

    train_dataloader = Language.loader

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.samples, self.losses = 160, []
        self.automatic_optimization = False
        self.generator, self.critic = network(4, 6), network(6, 1)

    def forward(self, noise):
        return self.generator(noise)

    def adversarial(self, data, real):
        return F.binary_cross_entropy_with_logits(self.critic(data), torch.full((len(data), 1), float(real)))

    def training_step(self, batch, index):
        data, noise = batch[:, :6] / 32, batch[:, :4] / 32
        first, second = self.optimizers()
        with torch.no_grad():
            self(noise)
        self.toggle_optimizer(first)
        generated = self.adversarial(self.generator(noise), real=True)
        first.zero_grad()
        self.manual_backward(generated)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        judged = self.adversarial(data, real=True) + self.adversarial(self(noise).detach(), real=False)
        self.manual_backward(judged)
        self.clip_gradients(second, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)
        self.losses += [float(self.all_gather(loss.detach()).mean()) for loss in (generated, judged)]

    def configure_optimizers(self):
        return torch.optim.Adam(self.generator.parameters(), 1e-2), torch.optim.Adam(self.critic.parameters(), 1e-2)


class Tempered(Adversarial):
    """A parameter of the module itself is used after the first backward of the step, as actor-critics do."""

    def __init__(self, shape):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(shape))

    def training_step(self, batch, index):
        first, second = self.optimizers()
        judged = self.adversarial(batch[:, :6] / 32, real=True)
        first.zero_grad()
        self.manual_backward(judged)
        first.step()
        tempered = (self.temperature.exp() * (batch[:, 0].float().mean() - 3)).mean()
        second.zero_grad()
        self.manual_backward(tempered)
        second.step()
        again = (self.temperature * judged.detach()).sum()
        self.losses += [float(self.all_gather(loss.detach()).mean()) for loss in (judged, tempered, again)]

    def configure_optimizers(self):
        rest = [parameter for name, parameter in self.named_parameters() if name != "temperature"]
        return torch.optim.SGD(rest, 1e-2), torch.optim.SGD([self.temperature], 1e-2)


class ByHand(Adversarial):
    """Clips and clears gradients as plain torch does."""

    def training_step(self, batch, index):
        first, _ = self.optimizers()
        loss = self.adversarial(batch[:, :6] / 32, real=True) + self.critic(self.generator(batch[:, :4] / 32)).mean()
        self.manual_backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        first.step()
        self.zero_grad()
        assert all(parameter.grad is None for parameter in self.parameters())
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.losses += [float(self.all_gather(loss.detach()).mean()), float(whole)]


class Watched(Language):
    """Evaluated by a callback between backward and the optimizer's step, where gathered parameters would go stale."""

    def on_before_optimizer_step(self, optimizer):
        with torch.no_grad():
            tokens = torch.arange(8).view(1, 8)
            self.evaluated.append(float(self.head(self(tokens)).sum()))


def fit(module, plan, devices, callbacks=(), arguments=(), **options):
    model = module(*arguments)
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    run = trainer(strategy, devices=devices, callbacks=[callback() for callback in callbacks], **options)
    run.fit(model)
    return model.losses + getattr(model, "evaluated", [])


@pytest.mark.parametrize("plan", PLANS)
def test_manual_optimisation_of_two_networks(two, plan):
    for losses in two.run(fit, Adversarial, plan, 2):
        assert losses == pytest.approx(fit(Adversarial, None, 1), rel=1e-5)


@pytest.mark.parametrize("shape", [1, 4])
@pytest.mark.parametrize("plan", PLANS)
def test_a_parameter_of_the_module_itself_after_a_backward_in_the_step(two, plan, shape):
    options = {"arguments": [shape], "max_steps": 4}
    for losses in two.run(fit, Tempered, plan, 2, **options):
        assert losses == pytest.approx(fit(Tempered, None, 1, **options), rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_clipping_and_clearing_by_hand_inside_a_step(two, plan):
    for losses in two.run(fit, ByHand, plan, 2, max_steps=4):
        assert losses == pytest.approx(fit(ByHand, None, 1, max_steps=4), rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_forward_between_backward_and_step_leaves_nothing_stale(two, plan):
    for losses in two.run(fit, Watched, plan, 2, max_steps=6):
        assert losses == pytest.approx(fit(Watched, None, 1, max_steps=6), rel=1e-4)


class Reductions(TorchDispatchMode):
    """Counts the collectives that reduce gradients."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "reduce" in str(function):
            self.counts[str(function)] += any(
                leaf.is_floating_point() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)
            )
        return function(*args, **(kwargs or {}))


def reductions(plan, accumulated):
    """How often gradients were reduced in two optimizer steps of so many micro-batches each."""
    run = trainer(LargeScaleStrategy(plan), devices=plan.world_size, max_steps=2, accumulate_grad_batches=accumulated)
    with Reductions() as communication:
        run.fit(Language())
    return communication.counts


@pytest.mark.parametrize("plan", [*PLANS[:2], Plan(dp_replicate=2, dp_shard=2)])
def test_accumulation_reduces_once_a_step(two, four, plan):
    ranks = two if plan.world_size == 2 else four
    once, often = ranks.run(reductions, plan, 1), ranks.run(reductions, plan, 4)
    assert once == often
    # Three blocks and the root, twice.
    assert [sum(number for name, number in counts.items() if "reduce_scatter" in name) for counts in once] == [8] * len(
        once
    )
