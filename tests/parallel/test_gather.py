"""A sharded module at work: backward inside steps, parts called outside of them, parameters frozen between steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
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


class Penalised(Language):
    """The gradient of the blocks' output is part of the loss."""

    def training_step(self, batch, index):
        x = self.embedding(batch[:, :-1]).detach().requires_grad_()
        out = x
        for block in self.blocks:
            out = block(out)
        (slope,) = torch.autograd.grad(self.head(out).pow(2).mean(-1).sum(), x, create_graph=True)
        loss = self.loss(batch) + (10 * slope).pow(2).mean()
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        return loss


@dataclass(frozen=True)
class Hidden:
    """What a block of some models returns."""

    x: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return Hidden(self.block(x))


class Unusual(Language):
    """Blocks whose output is an object that nobody may change."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped(block) for block in self.blocks)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x).x
        return self.norm(x)


class Watched(Language):
    """Evaluated by a callback between backward and the optimizer's step, where gathered parameters would go stale."""

    def on_before_optimizer_step(self, optimizer):
        with torch.no_grad():
            tokens = torch.arange(8).view(1, 8)
            self.evaluated.append(float(self.head(self(tokens)).sum()))


class Unfreeze(Callback):
    """Trains the head alone at first, then everything, and at the end all but the embedding."""

    def on_train_batch_start(self, trainer, module, batch, index):
        step = trainer.global_step
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name == "head.weight" or (step >= 3 and (step < 6 or "embedding" not in name)))


class Unfrozen(Language):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


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
def test_blocks_that_return_frozen_objects(two, plan):
    for losses in two.run(fit, Unusual, plan, 2, max_steps=4):
        assert losses == pytest.approx(fit(Unusual, None, 1, max_steps=4), rel=1e-5)


TWICE = [*PLANS[1:], Plan(dp_shard=2, activation_checkpointing="full")]


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("plan", [*PLANS[:1], *(pytest.param(plan, marks=pytest.mark.slow) for plan in TWICE)])
def test_second_derivatives(two, plan, accumulated):
    options = {"max_steps": 4, "accumulate_grad_batches": accumulated}
    for losses in two.run(fit, Penalised, plan, 2, **options):
        assert losses == pytest.approx(fit(Penalised, None, 1, **options), rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_forward_between_backward_and_step_leaves_nothing_stale(two, plan):
    for losses in two.run(fit, Watched, plan, 2, max_steps=6):
        assert losses == pytest.approx(fit(Watched, None, 1, max_steps=6), rel=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_unfrozen_between_steps_train(two, plan):
    for losses in two.run(fit, Unfrozen, plan, 2, [Unfreeze], max_steps=8):
        assert losses == pytest.approx(fit(Unfrozen, None, 1, [Unfreeze], max_steps=8), rel=1e-5)


def gathers():
    """Parameters gathered in one step of training, by name, in order; and how many are gathered when all is done."""
    seen = []

    class Traced(Language):
        def on_fit_start(self):
            for name, group in self.named_modules():
                if hasattr(group, "unshard"):
                    group.register_forward_pre_hook(lambda part, inputs, name=name: seen.append(name))

    model = Traced(tied=True)
    run = trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=1)
    run.fit(model)
    return (
        seen,
        sum(not isinstance(p, DTensor) for p in model.parameters()),
        model.head.weight is model.embedding.weight,
    )


def test_groups_are_the_blocks_and_nothing_stays_gathered(two):
    for seen, left, tied in two.run(gathers):
        assert seen == ["", "blocks.0", "blocks.1", "blocks.2"]
        assert left == 0
        assert tied


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
