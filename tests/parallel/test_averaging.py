"""Gradients that only show in the step, or come from a backward within it, are averaged: parity with one process."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from models import divided_loader, trainer
from ranks import quiet
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.techniques.replicate.apply import Replicate

pytestmark = quiet

DIM, STEPS = 6, 6


class Adapted(LightningModule):
    """A frozen base, and two adapters of which a step trains what `train` says.

    The samples of a batch that each of two ranks would have may be computed with adapters of their own.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(DIM, DIM).requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.head = nn.Linear(DIM, 1)
        self.step_number = 0

    def choose(self, step, half):
        """The adapter that the samples of a rank are computed with in a step."""
        return step % 2

    def train_adapter(self, chosen):
        for number, adapter in enumerate(self.adapters):
            adapter.requires_grad_(number == chosen)
        return self.adapters[chosen]

    def loss(self, x, half):
        return (
            self.head(torch.tanh(self.base(x)) + self.train_adapter(self.choose(self.step_number, half))(x))
            .square()
            .mean()
        )

    def halves(self, batch):
        if self.trainer.world_size == 2:
            return [(batch, self.global_rank)]
        return [(batch[0::2], 0), (batch[1::2], 1)]

    def whole_loss(self, batch):
        halves, losses, trainable = self.halves(batch[0]), [], set()
        for x, half in halves:
            losses.append(self.loss(x, half))
            trainable.update(one for one in self.parameters() if one.requires_grad)
        for parameter in trainable:
            # Backward leaves out what another half of the same process has frozen.
            parameter.requires_grad_(True)
        return sum(losses) / len(losses)

    def training_step(self, batch, index):
        loss = self.whole_loss(batch)
        self.step_number += 1
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)

    def train_dataloader(self):
        x = torch.randn(8 * STEPS, DIM, generator=torch.Generator().manual_seed(1))
        return divided_loader(self.trainer, TensorDataset(x))


class FrozenAtFirst(Adapted):
    """Nothing is trainable before the first step, all of it within."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def loss(self, x, half):
        self.head.requires_grad_(True)
        return super().loss(x, half)


class ByRank(Adapted):
    """Ranks train other adapters, in some steps the same."""

    def choose(self, step, half):
        return half if step % 3 else 0


class OnOneRank(Adapted):
    """In some steps a rank trains nothing but what was frozen on all ranks until then."""

    def loss(self, x, half):
        self.head.requires_grad_(self.step_number < 2 or half == 0)
        self.base.requires_grad_(self.step_number >= 2 and half == 1)
        return super().loss(x, half)

    def choose(self, step, half):
        return 0 if step < 2 else half


class FrozenInTheMidst(Adapted):
    """What was trained is frozen by a step, on one rank earlier than on the other."""

    def choose(self, step, half):
        return 0

    def loss(self, x, half):
        self.head.requires_grad_(self.step_number < 2 + half)
        return super().loss(x, half)


class Sparse(Adapted):
    """An adapter is a table whose gradients are sparse, which a rank may not use."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, DIM, sparse=True).requires_grad_(False)

    def loss(self, x, half):
        self.table.requires_grad_(True)
        if half == 0 or self.step_number % 2:
            x = x + self.table((x[:, 0] > 0).long() + half)
        return super().loss(x, half)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Manual(Adapted):
    """Two optimizers in each step, with parts of the module toggled, and gradients that are kept back for a while."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for number, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.step_number = number
            strategy = self.trainer.strategy
            with strategy.block_backward_sync() if self.trainer.world_size == 2 else contextlib.nullcontext():
                self.manual_backward(self.whole_loss(batch))
            self.step_number = 1 - number
            self.manual_backward(self.whole_loss(batch) * 0.5)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def train_adapter(self, chosen):
        return self.adapters[chosen]

    def configure_optimizers(self):
        return [
            torch.optim.SGD([*self.adapters.parameters()], lr=0.05),
            torch.optim.SGD([*self.head.parameters(), *self.base.parameters()], lr=0.05),
        ]


class Reentrant(Adapted):
    """Blocks are recomputed in a backward within the backward; one is never used."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(3))

    def loss(self, x, half):
        x = torch.tanh(self.adapters[0](x))
        for block in self.blocks[:2]:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(x).square().mean()


class ReentrantTwice(Reentrant):
    """A block is used twice, and outside of any recomputation too."""

    def loss(self, x, half):
        x = torch.tanh(self.adapters[0](x))
        for block in (*self.blocks[:2], self.blocks[0]):
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(self.blocks[1](x)).square().mean()


class ReentrantWhole(Reentrant):
    """One recomputation holds all parameters, and others within itself."""

    def loss(self, x, half):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
            return checkpoint(super().loss, x.requires_grad_(), half, use_reentrant=True)


class ReentrantDropped(Reentrant):
    """Blocks are dropped at random, on each rank others."""

    def loss(self, x, half):
        x = torch.tanh(self.adapters[0](x))
        for number, block in enumerate(self.blocks):
            if (self.step_number + number + half) % 3:
                x = checkpoint(block, x, use_reentrant=True)
        return self.head(x).square().mean()


class Reversible(torch.autograd.Function):
    """Recomputes a module in a backward of its own, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


class OwnFunction(Reentrant):
    """Recomputation of the user's own."""

    def loss(self, x, half):
        x = torch.tanh(self.adapters[0](x))
        for block in self.blocks:
            x = Reversible.apply(x, block)
        return self.head(x).square().mean()


def fit(kind, devices, accumulated=1, epochs=1):
    """All parameters after a fit."""
    model = kind()
    strategy = LargeScaleStrategy(Plan(dp_replicate=2)) if devices == 2 else "auto"
    run = trainer(strategy, devices=devices, max_epochs=epochs, accumulate_grad_batches=accumulated)
    run.fit(model)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def check(two, kind, **options):
    expected = fit(kind, 1, **options)
    for found in two.run(fit, kind, 2, **options):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


KINDS = [Adapted, FrozenAtFirst, ByRank, OnOneRank, FrozenInTheMidst, Sparse]
REENTRANT = [Reentrant, ReentrantTwice, ReentrantWhole, ReentrantDropped, OwnFunction]
QUICK = (ByRank, Reentrant)


RARE = (FrozenInTheMidst, ReentrantWhole, ReentrantDropped)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in RARE else ()) for kind in [*KINDS, Manual, *REENTRANT]],
)
def test_one_process_and_two_train_alike(two, kind):
    check(two, kind)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in [*KINDS, *REENTRANT]]
)
def test_accumulated(two, kind):
    check(two, kind, accumulated=2, epochs=2)


class Late(Reentrant):
    """Recomputes only once it has been trained without."""

    def loss(self, x, half):
        x = torch.tanh(self.adapters[0](x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.step_number > 2 else block(x)
        return self.head(x).square().mean()


class Unannounced(Manual):
    """Runs a backward that Lightning does not know of."""

    def training_step(self, batch, index):
        self.whole_loss(batch).backward()
        self.step_number += 1
        self.optimizers()[0].step()


class Grown(Adapted):
    """The last step makes a layer and trains it."""

    def loss(self, x, half):
        if self.step_number == STEPS - 1:
            self.more = nn.Linear(DIM, DIM)
            self.trainer.optimizers[0].add_param_group({"params": self.more.parameters()})
            x = self.more(x)
        return super().loss(x, half)


class Thawed(Adapted):
    """A layer that came frozen is trained later."""

    def loss(self, x, half):
        if self.step_number == 1:
            self.more = nn.Linear(DIM, DIM).requires_grad_(False)
        if self.step_number == 3:
            self.more.requires_grad_(True)
        return super().loss(self.more(x) if self.step_number > 2 else x, half)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Late, "call it with use_reentrant=False, or from the first step on"),
        (Unannounced, "call self.manual_backward(loss)"),
        (Grown, "parameter 'more.weight' is not of Grown as it was replicated"),
        (Thawed, "parameter 'more.weight', which came frozen, is not of Thawed as it was replicated"),
    ],
)
def test_refused_in_that_step(two, kind, message):
    errors = [error for error, _, _ in two.answers(fit, kind, 2)]
    assert None not in errors
    told = [str(error) for error in errors if isinstance(error, PlanError)]
    assert told
    assert all(message in one for one in told)


class Plain(Adapted):
    """Trains all of it in each step."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(True)

    def train_adapter(self, chosen):
        return lambda x: sum(adapter(x) for adapter in self.adapters)


def reduced_within(kind):
    """The parts of the module whose gradients each backward averages before it ends."""
    model, found = kind(), []

    class Watch(Callback):
        def on_before_backward(self, trainer, module, loss):
            (known,) = (one._replica._known for one in trainer.strategy._techniques if isinstance(one, Replicate))
            names = [name for name, parameter in module.named_parameters() if id(parameter) in known]
            found.append({name.removesuffix(".weight") for name in names if name.endswith("weight")})

    run = trainer(LargeScaleStrategy(Plan(dp_replicate=2)), devices=2, max_steps=3, callbacks=[Watch()])
    run.fit(model)
    return found


ALL = {"base", "adapters.0", "adapters.1", "head"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Plain, [set(), ALL, ALL]),
        (Adapted, [set(), {"adapters.0", "head"}, ALL - {"base"}]),
        (Reentrant, [set(), {"adapters.0", "head"}, {"adapters.0", "head"}]),
    ],
)
def test_averaged_within_backward(two, kind, expected):
    assert two.run(reduced_within, kind) == [expected] * 2
