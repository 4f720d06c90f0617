"""Recomputation: the same numbers, the cost counted in FLOPs, and nothing left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import CONTEXT, VOCAB, Language
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_largescale.parallel.recompute import apply_recompute, remove_recompute
from lightning_largescale.plan import Plan, PlanError

FULL = Plan(activation_checkpointing="full")


def train(model, steps=3):
    """Losses of some steps on random text."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.loss(torch.randint(VOCAB, (4, CONTEXT + 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_trains_like_plain_dropout_included():
    plain = Language(dropout=0.1)
    ours = copy.deepcopy(plain)
    apply_recompute(ours, FULL)
    assert train(ours) == train(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("full", 1), ("full", 2)])
def test_backward_computes_each_block_once_more(mode, times):
    model = Language()
    for _ in range(times):
        apply_recompute(model, Plan(activation_checkpointing=mode))
    x = torch.randn(4, CONTEXT, 16, requires_grad=True)
    block = model.blocks[0]
    with FlopCounterMode(display=False) as forward:
        y = block(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # The second of the block's two equal products is not computed again: nothing in backward needs its result.
    assert backward.get_total_flops() == (2.5 if mode == "full" else 2) * forward.get_total_flops()


def test_undone_it_copies_and_pickles_as_before():
    model = Language()
    model.blocks[1].forward = own = lambda x: 2 * x
    apply_recompute(model, FULL)
    remove_recompute(model)
    assert model.blocks[1].forward is own
    assert [name for block in model.blocks for name in vars(block) if name == "forward"] == ["forward"]
    del model.blocks[1].forward
    assert train(pickle.loads(pickle.dumps(model))) == train(copy.deepcopy(model))


def test_no_blocks():
    with pytest.raises(PlanError, match="activation_checkpointing='full' needs repeated blocks and Linear has none"):
        apply_recompute(nn.Linear(2, 2), FULL)
