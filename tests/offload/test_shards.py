"""Shards come to a CUDA device with their values, whatever is computed in the memory of those before."""

from __future__ import annotations

import pytest
import torch

from lightning_largescale.offload.shards import ShardCopies

pytestmark = pytest.mark.gpu


def test_copies_have_the_values_of_their_sources():
    copies, found = ShardCopies(torch.device("cuda", 0)), []
    for number in range(4):
        sources = [torch.full((4096,), float(number)).pin_memory(), torch.full((64,), -float(number)).pin_memory()]
        with copies.copies(sources) as (made, read):
            found += [one * 2 for one in made]
        read.wait()
        for source in sources:
            source.fill_(torch.nan)
    assert [float(one.mean()) for one in found] == [0, 0, 2, -2, 4, -4, 6, -6]


def test_what_another_stream_computes_is_not_waited_for():
    copies = ShardCopies(torch.device("cuda", 0))
    other = torch.cuda.Stream()
    with torch.cuda.stream(other), copies.copies([torch.ones(4096).pin_memory()]) as ((one,), _):
        total = one.sum()
    with copies.copies([torch.full((4096,), 3.0).pin_memory()]) as ((one,), _):
        assert float(one.sum()) == 3 * 4096
    other.synchronize()
    assert float(total) == 4096
