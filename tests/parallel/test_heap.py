"""Freed memory goes back to the system, where the heap would have kept it."""

from __future__ import annotations

import platform

import pytest

# In a process of its own: a heap with holes from before is filled first, and its holes are not mappings.
RETURNED_BYTES = """
import psutil, torch
from lightning_largescale.parallel.heap import map_from
map_from(8 * 2**20)
del (first := [torch.ones(4 * 2**20)])[:]  # glibc raises its own limit when so much is freed
tensors = [torch.ones(2 * 2**20) for _ in range(16)]
held = psutil.Process().memory_info().rss
del tensors[::2]
print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_holes_are_given_back(run_python):
    # Eight tensors of 8 MiB were freed.
    assert int(run_python(RETURNED_BYTES)) > 0.95 * 64 * 2**20


GROWN_BYTES = """
import os, torch
from lightning_largescale.hardware.usage import held_bytes
from lightning_largescale.parallel.heap import HeapGuard
del (first := [torch.ones(4 * 2**20)])[:]
base = held_bytes("cpu")
small = [torch.ones(2 * 2**20) for _ in range(16)]
del small[::2]
HeapGuard(base + int(os.environ["LIMIT_BYTES"]))()
large = [torch.ones(4 * 2**20) for _ in range(8)]  # larger than the holes that there are
del large[::2]
print((held_bytes("cpu") - base) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_a_plain_run_is_left_alone_until_it_outgrows_its_plan(run_python):
    alone, guarded = (int(run_python(GROWN_BYTES, LIMIT_BYTES=str(limit))) for limit in (2**30, 2**20))
    # Live are eight tensors of 8 MiB and four of 16; as many of either were freed.
    assert alone > 240
    assert 120 <= guarded < 140
