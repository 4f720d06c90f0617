import sys

import pytest
import torch

from lightning_largescale.hardware.usage import (
    HeapTrimmer,
    at_rest,
    held_bytes,
    let_rest,
    peak_bytes,
    release_free_memory,
    start_peak,
)
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.store import Store

MIB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore:.*without O_DIRECT")
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


@pytest.fixture
def region(tmp_path):
    store = Store(tmp_path)
    yield Region(store, "weights", 32 * MIB)
    store.close()


def test_what_views_a_file_is_at_rest_until_it_is_fetched(region):
    tensor = region.tensor(torch.float32, (MIB,), 4 * MIB)
    assert at_rest(tensor)
    assert at_rest(tensor[5:7])
    assert at_rest(torch.nn.Parameter(tensor))
    assert not at_rest(tensor.clone())
    assert not at_rest(tensor[:0])
    assert not at_rest(torch.empty(3, device="meta"))
    region.fetch().wait()
    assert not at_rest(tensor)
    region.drop()
    assert at_rest(tensor)


def test_it_is_at_rest_for_as_long_as_there_are_tensors_of_it(tmp_path):
    store = Store(tmp_path)
    tensor = Region(store, "weights", MIB).tensor(torch.float32, (10,))
    store.close()
    assert at_rest(tensor)


@linux
def test_the_system_takes_back_what_was_read_or_written(region):
    tensor = region.tensor(torch.uint8, (32 * MIB,))
    before = held_bytes("cpu")
    tensor.fill_(3)
    assert held_bytes("cpu") > before + 24 * MIB
    let_rest(tensor)
    assert held_bytes("cpu") < before + 8 * MIB
    assert tensor[::4096].eq(3).all()
    let_rest(tensor[: 16 * MIB])
    assert before + 8 * MIB < held_bytes("cpu") < before + 24 * MIB


def test_what_is_no_files_is_left_as_it_is(region):
    ordinary = torch.ones(MIB)
    let_rest(ordinary)
    assert ordinary.eq(1).all()
    region.claim()
    tensor = region.tensor(torch.uint8, (MIB,)).fill_(7)
    let_rest(tensor)
    assert tensor.eq(7).all()


@pytest.mark.gpu
def test_cuda_counts_what_torch_allocates():
    start_peak("cuda")
    before = peak_bytes("cuda")
    large = torch.ones(64 * MIB // 4, device="cuda")
    assert peak_bytes("cuda") - before == 64 * MIB
    assert held_bytes("cuda") >= large.nbytes
