import pytest
import torch
from ranks import run_connected

from lightning_largescale.hardware.collectives import agree, collective_links, hop_sizes, meet


def measure(seconds):
    ranks, count = torch.distributed.get_world_size(), 2**19 // 4
    return collective_links(torch.zeros(ranks * count), torch.zeros(count), seconds)


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_the_same_links(world):
    first, *others = run_connected(world, measure, 0.2)
    assert set(first) == {"all_gather", "reduce_scatter", "all_reduce"}
    assert all(other == first for other in others)
    for link in first.values():
        assert 1e4 < link.bandwidth < 1e12
        assert 0 <= link.latency_seconds < 1


def test_no_time_still_measures_the_smallest():
    links = run_connected(2, measure, 1e-9)
    assert links[0] == links[1]


def agreed():
    cpu = torch.device("cpu")
    meet(cpu)
    return agree(7 + torch.distributed.get_rank(), cpu)


def test_rank_0_decides():
    assert run_connected(2, agreed) == [7, 7]


def test_sizes_fit_the_memory():
    assert hop_sizes(2, 10**9)[-1] == 2**24
    assert hop_sizes(2, 2**22)[-1] == 2**19
    assert hop_sizes(1024, 1) == [2**10]
