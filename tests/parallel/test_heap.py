"""Freed memory goes back to the system, where the heap would have kept it."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from lightning_largescale.parallel.heap import map_from


def returned_bytes():
    """Resident bytes that go when every other tensor of 8 MiB is freed, after one that raises glibc's own limit."""
    map_from(8 * 2**20)
    del (first := [torch.ones(4 * 2**20)])[:]
    tensors = [torch.ones(2 * 2**20) for _ in range(16)]
    held = psutil.Process().memory_info().rss
    del tensors[::2]
    return held - psutil.Process().memory_info().rss, len(tensors), len(first)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_holes_are_given_back(two):
    # Eight tensors were freed: 64 MiB. Around the freeing alone, so that what else a rank does is not counted.
    returned_mib = [returned / 2**20 for returned, _, _ in two.run(returned_bytes)]
    assert min(returned_mib) > 58, returned_mib
