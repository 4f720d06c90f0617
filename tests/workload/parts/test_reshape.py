"""Where a division goes in a view, against views of real tensors."""

import itertools
import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_largescale.workload.parts import Part, cut, join
from lightning_largescale.workload.parts.reshape import reshaped

RANKS = 2


@st.composite
def views(draw):
    """A shape, another one of as many elements, and a division of the first."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=6))

    def grouped():
        edges = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
        bounds = [0, *edges, len(factors)]
        return [math.prod(factors[start:stop]) for start, stop in itertools.pairwise(bounds)]

    shape, target = grouped(), grouped()
    dim = draw(st.integers(0, len(shape) - 1))
    size = shape[dim]
    counts = [count for count in range(1, size + 1) if size % (count * RANKS) == 0]
    assume(counts)
    count = draw(st.sampled_from(counts))
    return shape, target, Part(dim, (size // count,) * count)


@given(views())
def test_parts_viewed_alike_are_parts_of_the_view(case):
    shape, target, part = case
    whole = torch.arange(math.prod(shape)).view(shape)
    found = reshaped(part, shape, target, RANKS)
    if found is None:
        return
    parts = []
    for rank in range(RANKS):
        local = cut(whole, part, rank, RANKS).contiguous()
        sizes = [size // RANKS if dim == found.dim else size for dim, size in enumerate(target)]
        parts.append(local.view(sizes))
    assert torch.equal(join(parts, found), whole.view(target))


@given(views())
def test_the_same_shape_keeps_the_division(case):
    shape, _, part = case
    assert reshaped(part, shape, shape, RANKS) == part


def test_heads():
    split = Part(2, (12,))
    assert reshaped(split, [2, 5, 12], [2, 5, 4, 3], 2) == Part(2, (4,))
    assert reshaped(split, [2, 5, 12], [2, 5, 3, 4], 2) is None
    assert reshaped(Part(2, (4, 4, 4)), [2, 5, 12], [2, 5, 3, 2, 2], 2) == Part(3, (2,))
    assert reshaped(Part(1, (4,)), [2, 4, 5, 3], [8, 5, 3], 2) == Part(0, (4, 4))
    assert reshaped(Part(0, (4, 4)), [8, 5, 3], [2, 4, 5, 3], 2) == Part(1, (4,))
    assert reshaped(Part(1, (7,)), [6, 7], [2, 3, 7], 2) == Part(2, (7,))
