"""Recomputation that keeps the results of products: the same numbers, whatever blocks do with these results."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from models import CONTEXT, DIM, Language
from techniques.activation_checkpoint.test_recompute import train
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_largescale.parallel.compile import compile_blocks
from lightning_largescale.plan import Plan
from lightning_largescale.techniques.activation_checkpoint.recompute import apply_recompute

CHEAP = Plan(activation_checkpointing="full", checkpointed_operations="cheap")


class Made(nn.Module):
    """A block of one residual branch, as the argument computes it."""

    def __init__(self, branch):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(DIM, 32), nn.Linear(32, DIM), nn.LayerNorm(DIM)
        self.branch = branch

    def forward(self, x):
        return self.branch(self, x)


def attention(block, x, dropout=0.0):
    q, k, v = F.linear(x, block.up.weight[:DIM]), x, block.norm(x)
    p = dropout if block.training else 0.0
    return x + F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def written_by_the_block(block, x):
    hidden = block.up(x)
    hidden.relu_()
    return x + block.down(hidden)


def written_in_part(block, x):
    hidden = block.up(x)
    hidden[..., :4].mul_(2)
    return x + block.down(F.gelu(hidden)).add_(1)


def written_later(block, x):
    # The result itself leaves the block, and whoever has it may write into it.
    return block.down(F.gelu(block.up(block.norm(x))))


def into_a_given_tensor(block, x):
    hidden = block.up(x)
    with torch.no_grad():
        made = torch.empty(DIM, DIM)
        torch.mm(block.down.weight, block.up.weight, out=made)
    return x + block.down(F.gelu(hidden)) @ made


def random_between(block, x):
    hidden = F.dropout(block.up(x), 0.2, block.training)
    return F.dropout(attention(block, x, dropout=0.3), 0.2, block.training) + block.down(hidden)


def convolved(block, x):
    kernel = block.up.weight.view(32, DIM, 1)
    return x + block.down(F.silu(F.conv1d(x.transpose(1, 2), kernel).transpose(1, 2)))


def remembered(block, x):
    # A product that the second forward has no need of, of the shape of another.
    if not hasattr(block, "table"):
        with torch.no_grad():
            block.table = block.up.weight.T @ block.down.weight.T
    mixed = torch.mm(x.flatten(0, 1)[:DIM], block.table)
    return x + torch.tanh(torch.mm(mixed, block.table)).mean() * block.norm(x)


def sparse(block, x):
    scales = torch.eye(DIM).to_sparse()
    scales.mul_(0.5)
    rows = (scales @ x.flatten(0, 1)[:DIM]).mean(0)
    return x + rows + block.down(F.gelu(block.up(x @ scales.to_dense())))


BRANCHES = [
    remembered,
    sparse,
    attention,
    written_by_the_block,
    written_in_part,
    written_later,
    into_a_given_tensor,
    random_between,
    convolved,
]


class Writing(Language):
    """Writes into what its blocks return."""

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
            x.mul_(0.9)
            x += 0.1
        return self.norm(x)


def of_blocks(branch, kind=Language):
    torch.manual_seed(0)
    model = kind()
    model.blocks = nn.ModuleList(Made(branch) for _ in range(3))
    return model


@pytest.mark.parametrize("kind", [Language, Writing])
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)
def test_trains_like_plain(branch, kind):
    plain = of_blocks(branch, kind)
    ours = copy.deepcopy(plain)
    apply_recompute(ours, CHEAP)
    assert train(ours) == train(plain)


def test_trains_like_plain_dropout_included():
    plain = Language(dropout=0.1)
    ours = copy.deepcopy(plain)
    apply_recompute(ours, CHEAP)
    assert train(ours) == train(plain)


def test_products_run_once_and_what_is_cheap_is_not_kept():
    model = Language()
    apply_recompute(model, CHEAP)
    block, x = model.blocks[0], torch.randn(4, CONTEXT, DIM, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = block(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_a_second_backward_and_gradients_of_gradients():
    for plan in (CHEAP, Plan()):
        model = Language()
        apply_recompute(model, plan)
        x = torch.ones(2, CONTEXT, DIM, requires_grad=True)
        y = model.blocks[1](model.blocks[0](x)).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        first.square().sum().backward(retain_graph=True)
        y.backward()
        found = x.grad.clone()
        if plan == CHEAP:
            ours = found
    torch.testing.assert_close(ours, found)


def results():
    return sum(type(found).__name__ == "_Result" for found in gc.get_objects())


def test_what_is_kept_goes_with_the_graph():
    model = Language()
    apply_recompute(model, CHEAP)
    x = torch.randn(2, CONTEXT, DIM, requires_grad=True)
    y = model.blocks[0](x)
    assert results() > 0
    gc.disable()
    try:
        del y
        assert results() == 0
    finally:
        gc.enable()


def fold(x):
    return torch.tanh(x @ x.transpose(-1, -2)) @ x


class Folded(nn.Module):
    """A block with a function of its own that torch compiles, as attention that is written out is."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(DIM, DIM)
        self.fold = torch.compile(fold, backend="aot_eager", fullgraph=True)

    def forward(self, x):
        return x + self.fold(self.up(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_functions_that_are_compiled_inside_of_blocks():
    losses = []
    for plan in (Plan(), CHEAP):
        torch.manual_seed(0)
        model = Language()
        model.blocks = nn.ModuleList(Folded() for _ in range(3))
        apply_recompute(model, plan)
        losses.append(train(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# torch.compile's own import warns of torch.jit, and its look at a block's input of a gradient that is none.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_compiled_blocks():
    plain = Language()
    ours = copy.deepcopy(plain)
    apply_recompute(ours, CHEAP)
    compile_blocks(ours, {"backend": "aot_eager"})
    assert train(ours) == pytest.approx(train(plain), rel=1e-5)
