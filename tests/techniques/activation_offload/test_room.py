"""Room that is handed out: it comes back with the last that has it, and what came back is handed out first."""

from __future__ import annotations

import gc
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_largescale.offload.store import Store
from lightning_largescale.techniques.activation_offload.room import Buffers, Extents
from lightning_largescale.tiers import ALIGNMENT_BYTES


class Holder:
    """Something that is no more once nothing holds it."""


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def test_a_buffer_comes_back_with_the_last_view_of_it():
    buffers = Buffers()
    other, tensor = buffers.take(ALIGNMENT_BYTES), buffers.take(5000)[0]
    view, address = tensor[100:200].view(torch.float32), tensor.data_ptr()
    del tensor
    assert buffers.take(5000)[0].data_ptr() != address
    del view
    assert buffers.take(5000)[0].data_ptr() == address
    del other


def test_a_request_under_way_holds_its_buffer():
    buffers = Buffers()
    tensor, view = buffers.take(ALIGNMENT_BYTES)
    del tensor
    assert buffers.nbytes == ALIGNMENT_BYTES
    part = view[:10]
    del view
    assert buffers.nbytes == ALIGNMENT_BYTES
    del part
    assert not buffers.nbytes


def test_no_more_is_kept_than_was_in_use_at_once():
    buffers = Buffers()
    held = buffers.take(ALIGNMENT_BYTES)
    for pages in range(2, 12):
        assert len(buffers.take(pages * ALIGNMENT_BYTES)[0]) == pages * ALIGNMENT_BYTES
        assert buffers.nbytes <= (2 * pages + 1) * ALIGNMENT_BYTES
    del held
    assert not buffers.nbytes


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=40))
def test_stretches_never_overlap_and_come_back_whole(tmp_path_factory, asked):
    store = Store(tmp_path_factory.mktemp("disk"))
    extents = Extents(store)
    held = []
    for pages, drops in asked:
        if drops and held:
            held.pop(len(held) // 2)
        holder = Holder()
        extent = extents.take("it", pages * ALIGNMENT_BYTES - 1, holder)
        assert (extent.nbytes, extent.offset % ALIGNMENT_BYTES) == (pages * ALIGNMENT_BYTES, 0)
        held.append((holder, extent))
        spans = sorted((one.offset, one.offset + one.nbytes) for _, one in held)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    size = os.path.getsize(store.path / "tensors")
    held.clear()
    del holder
    gc.collect()
    assert extents.take("all", size, Holder()).offset == 0
    assert os.path.getsize(store.path / "tensors") == size
    store.close()


def test_a_stretch_bears_the_name_of_what_is_in_it_now(store):
    extents = Extents(store)
    first = Holder()
    one = extents.take("first", 10, first)
    del first
    second = Holder()
    assert extents.take("second", 10, second).name == "second"
    assert one.offset == 0
    assert os.path.getsize(store.path / "tensors") == ALIGNMENT_BYTES


@pytest.mark.gpu
def test_a_buffer_makes_room_for_a_larger_one_when_it_was_copied_into():
    buffers = Buffers(pinned=True)
    buffer, _ = buffers.take(2**20)
    buffer.copy_(torch.ones(2**20, dtype=torch.uint8, device="cuda"), non_blocking=True)
    del buffer, _
    larger, _ = buffers.take(2**21)
    assert buffers.nbytes == larger.nbytes
