"""Rows of a table: marks, and the way to whole tensors and back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of
from torch import nn

from lightning_largescale.parallel import rows as rows_module
from lightning_largescale.parallel.rows import Rows, full_rows, global_shape, mark_rows, own_rows, rows_of
from lightning_largescale.workload.parts import share

TABLE = torch.arange(33.0).view(11, 3)
WHOLE = {
    "rows": lambda: TABLE,
    "numbers": lambda: TABLE[:, 0],
    "sparse": lambda: torch.sparse_coo_tensor([[1, 4, 9, 10]], torch.ones(4, 3), (11, 3), check_invariants=False),
}


def test_marks():
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert rows_of(parameter) is None
    assert rows_of("no tensor") is None
    assert global_shape(parameter) == (2, 3)
    assert mark_rows(parameter, Rows(11, 4)) is parameter
    assert rows_of(parameter) == Rows(11, 4)
    assert global_shape(parameter) == (11, 3)


def test_marked_tensors_are_read_without_this_package(tmp_path):
    parameter = mark_rows(nn.Parameter(torch.ones(2, 3)), Rows(11, 4))
    path = tmp_path / "rows.pt"
    torch.save({"parameter": parameter, "rows": mark_rows(parameter.detach(), Rows(11, 4))}, path)
    read = torch.load(path, weights_only=True)
    assert [rows_of(tensor) for tensor in read.values()] == [Rows(11, 4)] * 2
    assert b"lightning_largescale" not in path.read_bytes()


def round_trip(kind, chunk_bytes):
    mesh_of()
    whole = WHOLE[kind]()
    rows_module.CHUNK_BYTES = chunk_bytes
    start, length = share(11, dist.get_rank(), dist.get_world_size())
    rows = Rows(11, start)
    own = own_rows(whole, rows)
    back = full_rows(own, rows)
    nothing = full_rows(own, rows, keep=False)
    return length, own.to_dense(), back.to_dense(), back.is_sparse, tuple(nothing.shape)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("chunk_bytes", [24, 2**20])
def test_whole_and_back(four, kind, chunk_bytes):
    expected = WHOLE[kind]().to_dense()
    for rank, (length, own, back, is_sparse, nothing) in enumerate(four.run(round_trip, kind, chunk_bytes)):
        assert length == (3, 3, 3, 2)[rank]
        assert torch.equal(own, expected[3 * rank : 3 * rank + length])
        assert torch.equal(back, expected)
        assert is_sparse == (kind == "sparse")
        assert nothing == (0, *expected.shape[1:])
