"""Collectives, by hand."""

from lightning_largescale.hardware import Link
from lightning_largescale.planner.costs import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds

LINK = Link(latency_seconds=1.0, bandwidth=100.0)


def test_rings_by_hand():
    assert all_gather_seconds(200, 4, LINK) == 3 * (1 + 2)
    assert reduce_scatter_seconds(200, 4, LINK) == 3 * (1 + 2)
    assert all_reduce_seconds(800, 4, LINK) == 6 * (1 + 2)
    assert all_gather_seconds(200, 1, LINK) == all_reduce_seconds(200, 1, LINK) == 0
