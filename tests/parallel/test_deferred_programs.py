"""Made-up programs of factories, views, writes, draws and reads give the same recorded as run plainly."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recorded import assert_same_bits, values_of

from lightning_largescale.parallel.deferred import Recording


def like(source, shape):
    """Elements of `source`, repeated, in `shape`."""
    count = torch.Size(shape).numel()
    return source.reshape(-1)[torch.arange(count) % source.numel()].reshape(shape)


def two_dims(one):
    return one if one.dim() == 2 else one.reshape(1, -1)


def seeded_aside(pool, number):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        pool.append(torch.rand(2, 3))
    return torch.rand(3)


def back_and_again(pool, number):
    state = torch.get_rng_state()
    pool.append(torch.randn(number + 1))
    torch.set_rng_state(state)
    return torch.randn(number + 1)


def seeded(pool, number):
    torch.manual_seed(number)
    return torch.rand(2)


# Each is given the tensors so far, one of them, another, and a number below four; what it returns joins them.
STEPS = [
    lambda pool, a, b, n: torch.zeros(n + 1, 3),
    lambda pool, a, b, n: torch.randn(2, n + 1),
    lambda pool, a, b, n: torch.arange(n + 2) / 2,
    lambda pool, a, b, n: torch.tensor([float(n), 2.0]),
    lambda pool, a, b, n: torch.empty(3, n + 1).uniform_(-1, 1),
    lambda pool, a, b, n: torch.randperm(n + 2).float(),
    lambda pool, a, b, n: a.t() if a.dim() == 2 else a.view(-1, 1),
    lambda pool, a, b, n: a[n % a.shape[0] :],
    lambda pool, a, b, n: a.reshape(-1)[n % a.numel() :: 2],
    lambda pool, a, b, n: two_dims(a)[:, n % two_dims(a).shape[1] :],
    lambda pool, a, b, n: a.detach().view(-1) if a.is_contiguous() else a.data,
    lambda pool, a, b, n: a.normal_(n, 0.5),
    lambda pool, a, b, n: a.uniform_(),
    lambda pool, a, b, n: a.bernoulli_(0.5),
    lambda pool, a, b, n: a.zero_(),
    lambda pool, a, b, n: a.mul_(n).add_(1),
    lambda pool, a, b, n: a.copy_(like(b, a.shape)),
    lambda pool, a, b, n: a.add_(like(b, a.shape).clone(), alpha=0.5),
    lambda pool, a, b, n: a.masked_fill_(like(b, a.shape) > 0.25, n),
    lambda pool, a, b, n: a.__setitem__(n % a.shape[0], n / 2),
    lambda pool, a, b, n: torch.mul(like(b, a.shape), n, out=torch.empty(a.shape)),
    lambda pool, a, b, n: a.clone(),
    lambda pool, a, b, n: a + like(b, a.shape),
    lambda pool, a, b, n: two_dims(a) @ two_dims(a).t(),
    lambda pool, a, b, n: torch.cat([a.reshape(-1)[:3], b.reshape(-1)[:2]]),
    lambda pool, a, b, n: torch.rand_like(a),
    lambda pool, a, b, n: torch.full_like(a, n),
    lambda pool, a, b, n: torch.bernoulli(a.sigmoid()),
    lambda pool, a, b, n: torch.nn.functional.dropout(a, 0.25),
    lambda pool, a, b, n: torch.nn.init.trunc_normal_(a) if a.numel() else None,
    lambda pool, a, b, n: torch.full((2,), a.sum().item()),
    lambda pool, a, b, n: torch.ones(2) if bool((a > b.mean()).any()) else torch.rand(1),
    lambda pool, a, b, n: a[a > 0].sum().reshape(1),
    lambda pool, a, b, n: torch.tensor(a.tolist()),
    lambda pool, a, b, n: torch.tensor(a.numpy() * 2) if n == 3 else a.bfloat16().float(),
    lambda pool, a, b, n: copy.deepcopy(a),
    lambda pool, a, b, n: pool.extend(copy.deepcopy([a, b])),
    lambda pool, a, b, n: seeded_aside(pool, n),
    lambda pool, a, b, n: back_and_again(pool, n),
    lambda pool, a, b, n: seeded(pool, n),
    lambda pool, a, b, n: torch.rand(2, generator=torch.Generator().manual_seed(n)),
    lambda pool, a, b, n: pool.pop(0) * 0 if len(pool) > 3 else None,
]
calls = st.tuples(*(st.integers(0, high) for high in (len(STEPS) - 1, 7, 7, 3)))


def run(program):
    pool = [torch.ones(2, 2), torch.randn(3)]
    for step, a, b, number in program:
        made = STEPS[step](pool, pool[a % len(pool)], pool[b % len(pool)], number)
        if made is not None:
            pool.append(made)
    return pool


def check(program, later, random):
    torch.manual_seed(0)
    plain = run(program)
    after = torch.get_rng_state()
    plain_later = [one.to(torch.bfloat16) * 2 for one in plain] if later else []
    torch.manual_seed(0)
    recording = Recording()
    with recording.record():
        ours = run(program)
    with recording.record():
        ours_later = [one.to(torch.bfloat16) * 2 for one in ours] if later else []
    before = torch.get_rng_state()
    values = values_of(recording, dict(enumerate([*ours, *ours_later])), random=random)
    for number, one in enumerate([*plain, *plain_later]):
        assert_same_bits(values[number], one, number)
    assert torch.equal(torch.get_rng_state(), after if random else before)


@given(st.lists(calls, max_size=12), st.booleans(), st.booleans())
@example([(25, 0, 0, 0), (29, 1, 0, 0), (30, 0, 0, 0)], False, True)
@example([(25, 0, 0, 0), (29, 1, 0, 0), (31, 0, 0, 0)], True, False)
@settings(max_examples=25)
def test_same_bits(program, later, random):
    check(program, later, random)


@pytest.mark.slow
@given(st.lists(calls, max_size=40), st.booleans(), st.booleans())
@settings(max_examples=1000)
def test_same_bits_of_longer_ones(program, later, random):
    check(program, later, random)
