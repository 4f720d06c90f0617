"""Optimizers are probed for whether they can step on the rows of a table."""

from __future__ import annotations

import pytest
import torch
from clicks import (
    REPLICATED,
    SHARDED,
    Recommender,
)
from models import trainer
from ranks import quiet

from lightning_largescale.errors import PlanError
from lightning_largescale.strategy import LargeScaleStrategy

# What torch says of every sparse gradient that an embedding of its own makes.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")]


class Steps(Recommender):
    """With any optimizer."""

    def __init__(self, kind, **options):
        super().__init__()
        self.kind, self.options = kind, options

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.1, **self.options)


class ScalesRows(torch.optim.SGD):
    """Each table by its own largest gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense()
                parameter -= 0.1 * gradient / gradient.abs().max()
        return loss


class KeepsNumbers(torch.optim.SGD):
    """A number a row."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = parameter[..., 0].clone()
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.to_dense()
        return loss


def fit_with(plan, kind, options):
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(Steps(kind, **options))


END = (
    "; give tables to torch.optim.SGD, Adagrad or SparseAdam, under manual optimization an optimizer of their own, or"
    " leave them out of row_sharded_embeddings."
)


@pytest.mark.parametrize(
    ("plan", "kind", "options", "message"),
    [
        (REPLICATED, torch.optim.AdamW, {}, "it takes no sparse gradient (RuntimeError: Adam does not support"),
        (SHARDED, torch.optim.SGD, {"weight_decay": 0.1}, "it takes no sparse gradient (RuntimeError: add(sparse,"),
        (REPLICATED, torch.optim.SGD, {"fused": True}, "it takes no sparse gradient (RuntimeError: "),
        (SHARDED, ScalesRows, {}, "its step on a table is not that on its rows"),
        (REPLICATED, KeepsNumbers, {}, "it keeps 'rows' of shape (8,) for a table of shape (8, 4)"),
    ],
    ids=["AdamW", "decay", "fused", "mixing", "numbers"],
)  # fmt: skip
def test_optimizers_that_are_refused(two, plan, kind, options, message):
    for error, _, _ in two.answers(fit_with, plan, kind, options):
        assert isinstance(error, PlanError)
        assert str(error).startswith(f"{kind.__name__} cannot train the row-sharded table 'users': {message}")
        assert str(error).endswith(END)
