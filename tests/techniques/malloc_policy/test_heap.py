"""Freed memory goes back to the system, where the heap would have kept it."""

from __future__ import annotations

import platform
import threading

import pytest

from lightning_largescale.techniques.malloc_policy.heap import HeapWatch

# In a process of its own: a heap with holes from before is filled first, and its holes are not mappings.
RETURNED_BYTES = """
import psutil, torch
from lightning_largescale.techniques.malloc_policy.heap import map_from
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


HELD_BYTES = """
import os, torch
from lightning_largescale.hardware.usage import held_bytes
from lightning_largescale.techniques.malloc_policy.heap import HeapWatch
del (first := [torch.ones(4 * 2**20)])[:]
base = held_bytes("cpu")
watch = HeapWatch(base + (int(os.environ["LIMIT_MIB"]) << 20))
tensors = [torch.ones(2 * 2**20) for _ in range(32)]
watch.look()
del tensors[::2]
soon = watch.look()
held = held_bytes("cpu") - base
more = [torch.ones(4 * 2**20) for _ in range(8)]  # larger than the holes that there are
watch.look()
print(held >> 20, (held_bytes("cpu") - base) >> 20, soon)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_holes_are_given_back_once_a_process_holds_more_than_its_limit(run_python):
    def held(limit):
        return run_python(HELD_BYTES, LIMIT_MIB=str(limit)).split()

    # 32 tensors of 8 MiB, of which half are freed; then 8 of 16.
    before, after, soon = map(float, held(1024))
    assert (before, after) == (pytest.approx(256, abs=8), pytest.approx(384, abs=8))
    assert soon > 0.1
    before, after, _ = map(float, held(200))
    assert (before, after) == (pytest.approx(256, abs=8), pytest.approx(256, abs=8))
    before, after, _ = map(float, held(0))
    assert (before, after) == (pytest.approx(256, abs=8), pytest.approx(256, abs=8))


def test_a_watch_ends():
    watch = HeapWatch()
    watch.start()
    watch.stop()
    assert not any("heap watch" in thread.name for thread in threading.enumerate())
