"""Where in a whole tensor a rank's elements stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_largescale.parallel.chunks import Chunk, chunks_of, in_boxes
from lightning_largescale.parallel.order import as_ordered
from lightning_largescale.parallel.tensor import divide_over
from lightning_largescale.workload.parts import Part


def put_together(shape, rows, sizes, dim):
    """A matrix divided by tensor parallelism, and by FSDP2 where the mesh has two dimensions: its chunks, by place."""
    mesh = mesh_of(shape)
    module = nn.Sequential(nn.Linear(rows, rows, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(rows * rows).view(rows, rows))
    part = Part(dim, sizes)
    divide_over(module, {"0.weight": part}, mesh["tp"] if len(shape) > 1 else mesh)
    if len(shape) > 1:
        fully_shard(module, mesh=mesh["dp_shard"])
        as_ordered(module[0].weight, part)
    return [(chunk.offsets, chunk.values.tolist()) for chunk in chunks_of(module[0].weight)]


CASES = [
    (8, (8,), 0),
    (8, (8,), 1),
    (7, (7,), 0),
    (3, (3,), 0),
    (12, (4, 4, 4), 0),
    (12, (4, 8), 0),
    (12, (4, 4, 4), 1),
]


@pytest.mark.parametrize(("rows", "sizes", "dim"), CASES)
def test_the_pieces_of_all_ranks_are_the_whole(two, four, rows, sizes, dim):
    for ranks, shape in ((two, (2,)), (four, (2, 2)), (four, (1, 4))):
        whole = torch.full((rows, rows), -1.0)
        for chunks in ranks.run(put_together, shape, rows, sizes, dim):
            for (row, column), values in chunks:
                values = torch.tensor(values)
                box = whole[row : row + values.shape[0], column : column + values.shape[1]]
                assert (box == -1).all()
                box.copy_(values)
        assert torch.equal(whole, torch.arange(float(rows * rows)).view(rows, rows))


def test_a_plain_tensor_is_one_piece_and_shares_its_memory():
    tensor = nn.Parameter(torch.zeros(2, 3))
    [chunk] = chunks_of(tensor)
    chunk.values.fill_(1)
    assert (chunk.offsets, tensor.sum().item()) == ((0, 0), 6)
    [scalar] = chunks_of(torch.tensor(2.0))
    assert (scalar.offsets, scalar.values.item()) == ((), 2)


@given(
    st.lists(st.integers(1, 6), max_size=4),
    st.integers(1, 200),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_boxes_are_small_and_together_the_piece(shape, limit, offsets):
    values = torch.zeros(shape)
    boxes = [*in_boxes(Chunk(tuple(offsets[: len(shape)]), values), limit)]
    for box in boxes:
        assert box.values.nbytes <= max(limit, values.element_size())
        # Shifted to where it says that it stands, the box is the same memory.
        there = values
        for dim, (start, before) in enumerate(zip(box.offsets, offsets, strict=False)):
            there = there.narrow(dim, start - before, box.values.shape[dim])
        assert there.data_ptr() == box.values.data_ptr()
        box.values.add_(1)
    assert (values == 1).all()
