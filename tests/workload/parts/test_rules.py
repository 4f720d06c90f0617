"""Each function's rule, against the function on whole tensors: every rank's part, put together, is the whole result."""

import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_largescale.workload.parts import CannotDivideError, OnParts, Part, Shapes, as_part, cut, join, part_of

RANKS = 2


class Gathered(Exception):
    """A rule had to gather."""


class Alone(OnParts):
    """One rank's engine, without the others: what needs them raises."""

    def computed_whole(self, func, args, kwargs):
        raise Gathered(func)

    def reduced(self, partial, operands):
        raise Gathered("sums")


def on_parts(function, tensors, divisions):
    """What each rank makes of its parts, with what it is a part of."""
    results = []
    for rank in range(RANKS):
        ranks = Shapes(RANKS)
        ranks.rank = rank
        local = [
            one if part is None else as_part(cut(one, part, rank, RANKS).clone(), part)
            for one, part in zip(tensors, divisions, strict=True)
        ]
        with Alone(ranks):
            results.append(function(*local))
    return results


def check(function, tensors, divisions):
    """Compare; what is gathered, or is no part, is not looked at further."""
    expected = function(*tensors)
    try:
        found = on_parts(function, tensors, divisions)
    except Gathered:
        return False
    for wanted, *parts in zip(*map(listed, (expected, *found)), strict=True):
        division = part_of(parts[0])
        assert division is not None
        whole = join(parts, division)
        assert whole.shape == wanted.shape
        torch.testing.assert_close(whole, wanted)
    return True


def listed(result):
    return list(result) if isinstance(result, list | tuple) else [result]


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
DIVISIONS = [Part(0, (2,)), Part(1, (6,)), Part(2, (8,)), Part(2, (4, 4)), Part(2, (2, 6))]
# Of one tensor, in each division: those that pass without a gather are right, and these must pass in some.
FUNCTIONS = {
    "gelu": F.gelu,
    "arithmetic": lambda x: (x * 2 + 1).neg() / 3 - x,
    "with a whole row": lambda x: x + torch.arange(x.shape[-1]),
    "with a whole tensor": lambda x: x * torch.arange(96.0).view(2, 6, 8),
    "comparison": lambda x: x.masked_fill(x > 0, 1.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "cast": lambda x: x.double().to(torch.float32).type_as(x),
    "like": lambda x: torch.zeros_like(x) + torch.ones_like(x),
    "transpose": lambda x: x.transpose(-1, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "turned": lambda x: x.mT,
    "all turned": lambda x: x.view(x.shape[0] * x.shape[1], x.shape[2]).T,
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 4, x.shape[2] // 4).transpose(1, 2),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat each": lambda x: x.repeat_interleave(2, dim=1),
    "chunk": lambda x: x.chunk(2, -1),
    "split": lambda x: x.split([2, 6], dim=-1),
    "split equally": lambda x: torch.split(x, 4, 2),
    "unbind": lambda x: x.unbind(1),
    "select": lambda x: x.select(0, 1),
    "index": lambda x: x[0],
    "index from the end": lambda x: x[..., -1],
    "slice": lambda x: x[:, 1:3],
    "halves turned": lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1),
    "new dimension": lambda x: x[:, None, :, None],
    "rows by a tensor": lambda x: x[torch.tensor([1, 0, 1])],
    "narrow": lambda x: x.narrow(1, 2, 3),
    "stack": lambda x: torch.stack([x, x + 1], 1),
    "cat": lambda x: torch.cat([x, torch.ones(2, 6, 8)], 0),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "largest": lambda x: x.max(dim=0),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: F.log_softmax(x, dim=1),
    "cumulative": lambda x: x.cumsum(0),
    "norm": lambda x: x.norm(dim=1),
    "normalised": lambda x: F.normalize(x, dim=-1),
    "layer norm": lambda x: F.layer_norm(x, (8,), torch.arange(8.0), torch.ones(8)),
    "rms norm": lambda x: F.rms_norm(x, (8,), torch.arange(8.0)),
    "sizes": lambda x: x.new_zeros(()) + x * x.size(1) * x.numel() * len(x) * x.shape[2],
    "einsum": lambda x: torch.einsum("bij,jk->bik", x, torch.arange(24.0).view(8, 3)),
    "times a matrix": lambda x: x @ torch.arange(24.0).view(8, 3),
    "linear": lambda x: F.linear(x, torch.arange(24.0).view(3, 8), torch.ones(3)),
    "scores": lambda x: x @ x.transpose(-2, -1),
    "by other names": lambda x: torch.sum(input=x, axis=1, keepdims=True) + torch.cat(tensors=[x, x], axis=1)[:, :1],
    "added product": lambda x: torch.baddbmm(torch.ones(2, 6, 3), x, torch.ones(2, 8, 3), beta=2, alpha=0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_passes_is_right(name):
    passed = [check(FUNCTIONS[name], [X], [division]) for division in DIVISIONS]
    assert any(passed)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, (1, 1, 6, 6), (2, 4, 6, 6)])
def test_attention_by_heads(shared, mask):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 6, 3, generator=generator) for heads in (4, shared, shared))
    bias = None if mask is None else torch.randn(mask, generator=generator)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=shared < 4)

    divided = Part(1, (shared,)) if shared > 1 else None
    assert check(attend, [q, k, v], [Part(1, (4,)), divided, divided])
    assert check(attend, [q, k, v], [Part(1, (4,)), None, None])
    assert not check(attend, [q, k, v], [Part(2, (6,)), None, None])


def test_whole_queries_of_more_heads_than_divided_keys_are_gathered():
    q, k, v = torch.randn(2, 4, 6, 3), torch.randn(2, 2, 6, 3), torch.randn(2, 2, 6, 3)
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    assert not check(attend, [q, k, v], [None, Part(1, (2,)), Part(1, (2,))])


def test_einsum_of_what_is_broadcast_or_repeated():
    column, square = torch.randn(2, 1, 1), torch.randn(6, 6)
    assert check(lambda x, y: torch.einsum("bsd,bsd->bsd", x, y), [X, column], [Part(1, (6,)), None])
    assert not check(lambda x: torch.einsum("ii->i", x), [square], [Part(0, (6,))])


def test_a_repetition_of_a_size_that_is_told():
    assert not check(lambda x: x.repeat_interleave(2, 1, output_size=12), [X], [Part(1, (6,))])


def test_what_is_divided_otherwise_than_the_one_beside_it_is_gathered():
    weight, bias = torch.randn(4, 8), torch.randn(4)
    assert check(F.linear, [X, weight, bias], [None, Part(0, (4,)), Part(0, (4,))])
    assert not check(F.linear, [X, weight, bias], [None, Part(0, (4,)), Part(0, (2, 2))])
    assert not check(F.layer_norm, [X, (8,), torch.ones(8)], [Part(1, (6,)), None, Part(0, (8,))])


def test_autocast_adds_a_bias_in_its_own_type():
    class Summing(Alone):
        def reduced(self, partial, operands):
            return partial

    weight, bias = torch.randn(4, 8), torch.randn(4)
    local = [as_part(X[..., :4].clone(), Part(2, (8,))), as_part(weight[:, :4].clone(), Part(1, (8,)))]
    with Summing(Shapes(RANKS)), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(*local, bias).dtype == torch.bfloat16


def test_what_functions_would_do_in_place_is_not_lost():
    local = as_part(torch.ones(2, 2), Part(1, (4,)))
    with OnParts(Shapes(RANKS)), pytest.raises(CannotDivideError, match="alpha_dropout writes into what is divided"):
        F.alpha_dropout(local, 0.5, True, inplace=True)


ELEMENTWISE = st.sampled_from([torch.add, torch.mul, torch.sub, torch.maximum])
SHAPES = st.sampled_from([(4,), (1, 4), (2, 4), (2, 1), (3, 2, 4), (3, 1, 4), (1,), ()])


@settings(deadline=None)
@given(ELEMENTWISE, SHAPES, SHAPES, st.integers(0, 2), st.booleans())
def test_operands_of_other_shapes(function, left, right, dim, both):
    one, other = torch.randn(left), torch.randn(right)
    dims = max(len(left), len(right))
    divisions = []
    for tensor in (one, other):
        at = dim - dims + tensor.dim()
        size = tensor.shape[at] if 0 <= at < tensor.dim() else 1
        divisions.append(Part(at, (size,)) if size % RANKS == 0 else None)
    if not both:
        divisions[1] = None
    if divisions != [None, None]:
        assert check(function, [one, other], divisions)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.std(True),
        lambda x: torch.where(x > 0),
        lambda x: x[np.int64(0)],
        lambda x: torch.sum(x, 1, out=torch.empty(2, 8)),
        lambda x: x.renorm(2, 0, 1.0),
        lambda x: x.sum(),
        lambda x: torch.max(x, x),
    ],
)
def test_what_no_rule_knows_is_gathered(function):
    for division in DIVISIONS:
        with pytest.raises(Gathered):
            on_parts(function, [X], [division])


def test_what_is_written_into_must_be_the_part():
    def add(x, y):
        return x.add_(y)

    assert check(lambda x: x.clone().mul_(2), [X], [Part(2, (8,))])
    with pytest.raises(Gathered):
        on_parts(add, [torch.ones(2, 6, 8), X], [None, Part(2, (8,))])


def test_the_engine_is_one_threads():
    seen = []
    with Alone(Shapes(RANKS)):
        part = as_part(torch.ones(2, 2), Part(1, (4,)))
        thread = threading.Thread(target=lambda: seen.append(part.shape[1]))
        thread.start()
        thread.join()
        assert part.shape[1] == 4
    assert seen == [2]
