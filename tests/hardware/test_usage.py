import sys

import pytest
import torch

from lightning_largescale.hardware.usage import HeapTrimmer, held_bytes, peak_bytes, release_free_memory, start_peak

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")


@linux
def test_the_peak_of_a_span_is_of_that_span():
    large = torch.ones(64 * MIB // 4)
    start_peak("cpu")
    before = held_bytes("cpu")
    assert peak_bytes("cpu") == pytest.approx(before, abs=8 * MIB)
    more = torch.ones(128 * MIB // 4)
    del more
    assert peak_bytes("cpu") == pytest.approx(before + 128 * MIB, abs=16 * MIB)
    del large
    start_peak("cpu")
    assert peak_bytes("cpu") < before


def fragmented():
    """Bytes in the heap that are free, but below others that are not."""
    rows = [torch.ones(64 * 1024 // 4) for _ in range(1024)]
    kept = rows[::8]
    del rows
    return kept


@linux
def test_holes_in_the_heap_are_given_back():
    kept = fragmented()
    before = held_bytes("cpu")
    release_free_memory()
    assert held_bytes("cpu") < before - 32 * MIB
    assert len(kept) == 128


@linux
def test_the_trimmer_keeps_to_its_share_of_the_time():
    trim = HeapTrimmer(share=1e-9)
    trim()
    kept = fragmented()
    before = held_bytes("cpu")
    trim()
    assert held_bytes("cpu") > before - 8 * MIB
    HeapTrimmer()()
    assert held_bytes("cpu") < before - 32 * MIB
    assert len(kept) == 128


@pytest.mark.gpu
def test_cuda_counts_what_torch_allocates():
    start_peak("cuda")
    before = peak_bytes("cuda")
    large = torch.ones(64 * MIB // 4, device="cuda")
    assert peak_bytes("cuda") - before == 64 * MIB
    assert held_bytes("cuda") >= large.nbytes
