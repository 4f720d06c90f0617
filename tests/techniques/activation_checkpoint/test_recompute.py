"""Recomputation: the same numbers, the cost counted in FLOPs, and nothing left behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import CONTEXT, VOCAB, Language
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.techniques.activation_checkpoint.recompute import apply_recompute, remove_recompute

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


def test_some_blocks():
    plain = Language()
    ours = copy.deepcopy(plain)
    chosen = Plan(activation_checkpointing="selective", checkpointed_blocks=("blocks.1",))
    apply_recompute(ours, FULL)
    apply_recompute(ours, chosen)
    with FlopCounterMode(display=False) as some:
        losses = train(ours, steps=1)
    with FlopCounterMode(display=False) as none:
        assert train(plain, steps=1) == losses
    assert vars(ours.blocks[1]).get("forward") is not None
    assert all(vars(block).get("forward") is None for block in ours.blocks if block is not ours.blocks[1])
    apply_recompute(ours, FULL)
    with FlopCounterMode(display=False) as full:
        train(ours, steps=1)
    assert none.get_total_flops() < some.get_total_flops() < full.get_total_flops()
    with pytest.raises(PlanError, match=r"has 'block.1', which is no repeated block .* such as 'blocks\.1'"):
        apply_recompute(ours, Plan(activation_checkpointing="selective", checkpointed_blocks=("block.1",)))


class Codebook(nn.Module):
    """Follows the mean of what it sees, in place or by another tensor, and computes with it."""

    def __init__(self, *, in_place):
        super().__init__()
        self.in_place, self.linear = in_place, nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("fixed", torch.ones(16))

    def forward(self, x):
        seen = x.detach().mean((0, 1))
        if self.in_place:
            self.mean.lerp_(seen, 0.3)
        else:
            self.mean = self.mean.lerp(seen, 0.3)
        return x + torch.tanh(self.linear(x - self.mean)) * self.fixed


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_buffers_change_once_and_are_what_they_were_when_it_runs_again(in_place, twice):
    plain = Language()
    block = nn.Sequential(Codebook(in_place=in_place), nn.BatchNorm1d(CONTEXT))
    plain.blocks = nn.ModuleList([block, block if twice else copy.deepcopy(block)])
    # A block that stands twice in a chain makes no chain by itself: a third makes it one.
    plain.blocks.append(copy.deepcopy(block))
    ours = copy.deepcopy(plain)
    apply_recompute(ours, FULL)
    assert train(ours) == train(plain)
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name


def test_a_constant_that_blocks_share_is_copied_once():
    model = Language()
    mask = torch.ones(64)
    for block in model.blocks:
        block.register_buffer("mask", mask)
    apply_recompute(model, FULL)
    train(model, steps=2)
    (copies,) = {id(block.forward._copies): block.forward._copies for block in model.blocks}.values()
    assert [copy.shape for _, copy in copies.values()] == [mask.shape]


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


class Twice(nn.Module):
    """Has a buffer, and fails in its second forward if it is told to."""

    def __init__(self):
        super().__init__()
        self.linear, self.runs, self.fails = nn.Linear(16, 16), 0, False
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        self.runs += 1
        self.mean.add_(1)
        if self.fails and self.runs == 2:
            raise RuntimeError("again")
        return x + torch.tanh(self.linear(x)) * self.mean


@pytest.mark.parametrize("operations", ["all", "cheap"])
def test_buffers_are_back_after_a_second_backward_and_after_one_that_fails(operations):
    def block():
        model = Language()
        model.blocks = nn.ModuleList(Twice() for _ in range(2))
        apply_recompute(model, Plan(activation_checkpointing="full", checkpointed_operations=operations))
        return model.blocks[0]

    one, x = block(), torch.ones(2, 16, requires_grad=True)
    y = one(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    assert torch.equal(one.mean, torch.ones(16))
    other = block()
    other.fails, kept = True, other.mean
    with pytest.raises(RuntimeError, match="again"):
        other(x).sum().backward()
    assert other.mean is kept
    assert torch.equal(kept, torch.ones(16))
