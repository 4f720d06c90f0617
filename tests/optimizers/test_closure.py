from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import Language, Lion, trainer
from ranks import quiet
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from lightning_largescale.optimizers.closure import after_closure, closure_first, evaluate_first
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:`training_step` returned `None`")]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_evaluated_once_with_gradients_and_then_tells(by_name):
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 3.0

    optimizer = object()
    with torch.no_grad():
        if by_name:
            args, kwargs = closure_first((optimizer,), {"closure": closure, "other": 1})
            told = kwargs["closure"]
            assert (args, kwargs["other"]) == ((optimizer,), 1)
        else:
            args, kwargs = closure_first((optimizer, closure, 2), {"other": 1})
            told = args[1]
            assert (args[0], args[2], kwargs) == (optimizer, 2, {"other": 1})
    assert calls == [True]
    assert [told(), told()] == [3.0, 3.0]
    assert calls == [True]


@pytest.mark.parametrize(("args", "kwargs"), [((1,), {}), ((1, None), {}), ((1,), {"closure": None})])
def test_without_a_closure_arguments_are_as_they_were(args, kwargs):
    assert closure_first(args, kwargs) == (args, kwargs)


@pytest.mark.parametrize("given", [lambda one: ((1, one), {}), lambda one: ((1,), {"closure": one})])
def test_what_follows_is_called_after_the_closure(given):
    calls = []
    args, kwargs = after_closure(*given(lambda: calls.append("closure") or 3.0), lambda: calls.append("then"))
    assert not calls
    assert [*args, *kwargs.values()][1]() == 3.0
    assert calls == ["closure", "then"]


def test_what_follows_is_called_at_once_without_a_closure():
    calls = []
    assert after_closure((1,), {"closure": None}, lambda: calls.append("then")) == ((1,), {"closure": None})
    assert calls == ["then"]


@pytest.mark.parametrize(
    ("kind", "paged", "first"),
    [(SGD, False, True), (AdamW, False, True), (LBFGS, False, False), (Lion, False, False), (Lion, True, True)],
)
def test_the_closure_is_evaluated_first_unless_it_may_be_evaluated_again(kind, paged, first):
    calls = []
    closure = evaluate_first(kind([nn.Parameter(torch.ones(2))]), lambda: calls.append(1) or 3.0, paged=paged)
    assert len(calls) == first
    assert [closure(), closure()] == [3.0, 3.0]
    assert len(calls) == (1 if first else 2)


class Evaluating(LargeScaleStrategy):
    """Runs forward and backward before the optimizer's step."""

    def optimizer_step(self, optimizer, closure, *args, **kwargs):
        first = evaluate_first(optimizer, closure, paged=self._pages)
        self.evaluated = first is not closure
        return super().optimizer_step(optimizer, first, *args, **kwargs)


class Noting(Language):
    """Clips, skips a step, and notes the hooks around backward and the step in their order."""

    def __init__(self, kind, **options):
        super().__init__(layers=2, **options)
        self.kind, self.calls = kind, []

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.01)

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return None if index == 1 and self.trainer.world_size == 1 and self.kind is not LBFGS else loss

    def on_before_zero_grad(self, optimizer):
        self.calls.append("zero")

    def on_after_backward(self):
        self.calls.append("backward")

    def on_before_optimizer_step(self, optimizer):
        self.calls.append("before")
        self.calls += [float(one.grad.norm()) for one in self.parameters() if one.grad is not None]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.calls.append("clip")
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def fit(strategy, kind, plan, devices, scaled=False):
    module = Noting(kind)
    plugins = [MixedPrecision("16-mixed", "cpu")] if scaled else []
    run = trainer(strategy(plan), devices=devices, max_steps=4, gradient_clip_val=0.1, plugins=plugins)
    run.fit(module)
    return module.losses, module.calls, getattr(run.strategy, "evaluated", None)


@pytest.mark.parametrize(
    ("kind", "plan", "options"),
    [
        (AdamW, Plan(), {}),
        (AdamW, Plan(precision="16-mixed"), {"scaled": True}),
        (LBFGS, Plan(), {}),
        (AdamW, Plan(offload_optimizer="cpu"), {}),
        (Lion, Plan(offload_optimizer="cpu"), {}),
    ],
    ids=["plain", "scaled", "LBFGS", "paged", "own paged"],
)
def test_hooks_and_numbers_are_those_of_a_closure_that_the_step_evaluates(kind, plan, options):
    losses, calls, first = fit(Evaluating, kind, plan, 1, **options)
    assert (losses, calls, None) == fit(LargeScaleStrategy, kind, plan, 1, **options)
    assert first == (kind is not LBFGS)
    assert len(losses) >= 4


@pytest.mark.parametrize("kind", [AdamW, Lion, partial(SGD, fused=True)], ids=["AdamW", "own", "fused SGD"])
def test_it_is_evaluated_first_on_shards(two, kind):
    found, expected = (two.run(fit, one, kind, Plan(dp_shard=2), 2) for one in (Evaluating, LargeScaleStrategy))
    for (losses, calls, first), (*numbers, _) in zip(found, expected, strict=True):
        assert (first, losses, calls) == (True, *numbers)
