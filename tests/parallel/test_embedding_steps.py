"""What Trainers do in and around steps, with row-sharded tables."""

from __future__ import annotations

import contextlib

import pytest
import torch
from clicks import (
    DIM,
    REPLICATED,
    SHARDED,
    WORDS,
    Clicks,
    Dense,
    Recommender,
    strategy_of,
)
from lightning.pytorch.utilities import grad_norm
from models import trainer
from ranks import quiet
from torch import nn
from torch.nn import functional as F

from lightning_largescale.strategy import LargeScaleStrategy

# What torch says of every sparse gradient that an embedding of its own makes.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")]


def fit_steps(plan, devices, **given):
    """With what Trainers do to gradients."""
    torch.manual_seed(0)
    model = (Recommender if plan else Dense)(momentum=0.9)
    run = trainer(strategy_of(plan), devices=devices, max_steps=6, **given)
    run.fit(model)
    if plan:
        run.strategy.make_whole()
    return model.losses, model.users.weight.detach()


OPTIONS = {
    "norm": {"gradient_clip_val": 0.05},
    "largest": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 3},
    "accumulated norm": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
}


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (REPLICATED, "norm"),
        (SHARDED, "norm"),
        (SHARDED, "largest"),
        (REPLICATED, "accumulated norm"),
        *(pytest.param(SHARDED, name, marks=pytest.mark.slow) for name in ("accumulated", "accumulated norm")),
        *(pytest.param(REPLICATED, name, marks=pytest.mark.slow) for name in ("largest", "accumulated")),
    ],
)
def test_clipping_and_accumulation(two, plan, name):
    expected, weight = fit_steps(None, 1, **OPTIONS[name])
    for losses, found in two.run(fit_steps, plan, 2, **OPTIONS[name]):
        assert losses == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-5)


class Doubles(Recommender):
    """The gradient of a table, in place, before it is clipped."""

    def on_before_optimizer_step(self, optimizer):
        self.users.weight.grad.mul_(2.0)


class DoublesDense(Dense):
    on_before_optimizer_step = Doubles.on_before_optimizer_step


def fit_doubling(plan, devices):
    model = (Doubles if plan else DoublesDense)()
    trainer(strategy_of(plan), devices=devices, max_steps=4, gradient_clip_val=0.05).fit(model)
    return model.losses


def test_clipping_of_a_gradient_that_a_hook_changed(two):
    expected = fit_doubling(None, 1)
    for losses in two.run(fit_doubling, SHARDED, 2):
        assert losses == pytest.approx(expected, rel=1e-5)


class Unannounced(Recommender):
    def training_step(self, batch, index):
        self.loss(batch).backward()
        for optimizer in self.optimizers():
            optimizer.step()


class Differentiates(Recommender):
    """A table, by itself: autograd gives None, and the gradient is with the table."""

    def training_step(self, batch, index):
        loss = super().loss(batch)
        torch.autograd.grad(loss, [self.users.weight], retain_graph=True, allow_unused=True)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        return None


def fit_module(kind, plan, **given):
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=2).fit(kind(**given))


@pytest.mark.parametrize(
    ("kind", "plan", "optimizer"),
    [
        (Unannounced, SHARDED, "SparseAdam"),
        (Differentiates, REPLICATED, "SGD"),
        (Differentiates, SHARDED, "SparseAdam"),
    ],
)
def test_a_backward_that_is_not_announced(two, kind, plan, optimizer):
    for error, _, _ in two.answers(fit_module, kind, plan, optimizer=optimizer):
        assert str(error) == (
            "table 'users' has gradients of a backward that the Trainer does not know of, and its rows are on all"
            " ranks; call self.manual_backward(loss) in the place of loss.backward(), and ask torch.autograd.grad for"
            " the gradient of no table."
        )


def fit_out_of_range(plan):
    model = Recommender()
    model.words = nn.EmbeddingBag(WORDS - 1, DIM, sparse=True)
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=20).fit(model)


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_id_out_of_range_in_a_step(two, plan):
    for error, _, _ in two.answers(fit_out_of_range, plan):
        assert str(error) == "table 'words' has 29 rows and was given id 29; ids must be 0 to 28."


class Further(Recommender):
    """Rank 1 looks up more than rank 0 before the blocks, in two forwards of a step."""

    def __init__(self, manual):
        super().__init__()
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        user, words, click = batch
        for extra in range(2):
            hidden = torch.cat([torch.zeros(len(user), DIM), self.words(words)], -1)
            if self.global_rank:
                hidden = torch.cat([self.users(user) + self.users(user // (2 + extra)), self.words(words)], -1)
            loss = F.binary_cross_entropy_with_logits(self.head(self.blocks(hidden)).squeeze(-1), click)
            if self.automatic_optimization:
                continue
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss if self.automatic_optimization else None


def fit_further(plan, manual):
    model = Further(manual)
    run = trainer(LargeScaleStrategy(plan), devices=2, max_steps=4)
    run.fit(model)
    run.strategy.make_whole()
    return model.users.weight.detach()


@pytest.mark.parametrize("manual", [False, True])
def test_ranks_that_look_up_more_than_others_between_gathers(two, manual):
    expected, _ = two.run(fit_further, REPLICATED, manual)
    for weight in two.run(fit_further, SHARDED, manual):
        torch.testing.assert_close(weight, expected)


class Uneven(Recommender):
    """Rank 1 has a batch less to evaluate."""

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Clicks(12 if self.trainer.global_rank == 0 else 8), batch_size=4)


def evaluate(plan):
    model = Uneven()
    run = trainer(LargeScaleStrategy(plan), devices=2, limit_val_batches=1.0)
    run.validate(model, verbose=False)
    return model.evaluated


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_uneven_evaluation(two, plan):
    plain = Uneven()
    trainer(limit_val_batches=1.0).validate(plain, verbose=False)
    first, second = two.run(evaluate, plan)
    assert first == pytest.approx(plain.evaluated, rel=1e-5)
    assert second == pytest.approx(plain.evaluated[:2], rel=1e-5)


class Reads(Recommender):
    """Uses the whole table in a step, and clips by itself."""

    def __init__(self, full=False):
        super().__init__()
        self.automatic_optimization, self.full = False, full
        self.users.sparse = self.words.sparse = full
        self.norms = []

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with self.trainer.strategy.full_parameters() if self.full else contextlib.nullcontext():
            penalty = 0.1 * self.users.weight.square().mean()
        loss = self.loss(batch) + penalty
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        self.manual_backward(loss)
        self.norms.append({name: float(norm) for name, norm in grad_norm(self, 2).items()})
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_before_optimizer_step(self, optimizer):
        pass


def fit_reading(plan, devices):
    torch.manual_seed(0)
    model = Reads(full=plan is not None)
    trainer(strategy_of(plan), devices=devices, max_steps=4).fit(model)
    return model.losses, model.norms


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_whole_tables_and_norms_within_steps(two, plan):
    expected, norms = fit_reading(None, 1)
    for losses, found in two.run(fit_reading, plan, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        for one, other in zip(found, norms, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


class Accumulates(Recommender):
    """By its own means, the tables being used in the first micro-batch alone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        first = index % 2 == 0
        if first:
            optimizer.zero_grad()
        synchronize = contextlib.nullcontext()
        if first and isinstance(self.trainer.strategy, LargeScaleStrategy):
            synchronize = self.trainer.strategy.block_backward_sync()
        user, words, click = batch
        with synchronize:
            hidden = torch.cat([self.users(user), self.words(words)], -1)
            logits = self.head(hidden if first else hidden.detach()).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits, click)
            self.losses.append(float(self.all_gather(loss.detach()).mean()))
            self.manual_backward(loss)
        if not first:
            optimizer.step()


def fit_accumulating(plan, devices):
    model = Accumulates()
    trainer(strategy_of(plan), devices=devices, max_steps=4).fit(model)
    return model.losses


@pytest.mark.parametrize("plan", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_manual_accumulation(two, plan):
    expected = fit_accumulating(None, 1)
    for losses in two.run(fit_accumulating, plan, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
