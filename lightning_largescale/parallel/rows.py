"""Row-sharded tables: a rank's rows are a plain local parameter, marked with their place in the full table.

The mark is an attribute of the tensor, since gradients of such parameters carry it too. Checkpoints and full parameters
convert by `full_rows` and `own_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_largescale import comm
from lightning_largescale.groups import carrying_device
from lightning_largescale.workload.parts import share

_ATTRIBUTE = "_largescale_rows"
# Bytes per broadcast of rows, so that no rank holds much beside its own rows.
CHUNK_BYTES = 16 * 2**20

_Tensor = TypeVar("_Tensor", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Rows:
    """The place of a local tensor's rows in the full table.

    Attributes:
        rows: number of rows of the full table.
        start: index of this rank's first row.
    """

    rows: int
    start: int


def rows_of(tensor: object) -> Rows | None:
    """Return the rows that `tensor`, a parameter or its gradient, has; None if it is not row-sharded or no tensor."""
    mark = getattr(tensor, _ATTRIBUTE, None)
    return None if mark is None else Rows(*mark)


def mark_rows(tensor: _Tensor, rows: Rows) -> _Tensor:
    """Mark `tensor` as `rows` of a table; return it."""
    # Plain numbers, which torch.load considers safe and can load without this package.
    setattr(tensor, _ATTRIBUTE, (rows.rows, rows.start))
    return tensor


def global_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the full table that `tensor` has rows of; its own shape if it is not row-sharded."""
    rows = rows_of(tensor)
    return tensor.shape if rows is None else torch.Size([rows.rows, *tensor.shape[1:]])


def own_rows(full: Tensor, rows: Rows) -> Tensor:
    """Return this rank's rows of `full`, without communication.

    Args:
        full: a table or its row-wise state of shape (rows, ...), equal on all ranks, dense or sparse COO, on any
            device.
        rows: the place of this rank's rows.
    """
    _, length = share(rows.rows, comm.rank(), comm.world_size())
    if not full.is_sparse:
        # A view would keep the full table in memory.
        return full.narrow(0, rows.start, length).clone(memory_format=torch.contiguous_format)
    full = full.coalesce()
    ids = full.indices()[0]
    own = (ids >= rows.start) & (ids < rows.start + length)
    return sparse_rows(ids[own] - rows.start, full.values()[own], torch.Size([length, *full.shape[1:]]))


def full_rows(local: Tensor, rows: Rows, *, keep: bool = True) -> Tensor:
    """Gather a full row-sharded table, or its row-wise state; a collective.

    Args:
        local: this rank's rows, dense or sparse COO (the same layout on all ranks), on any device.
        rows: the place of these rows.
        keep: whether this rank needs the full table.

    Returns:
        A dense or sparse tensor of shape (rows, ...) on the CPU; an empty one without `keep`.
    """
    if local.is_sparse:
        return _full_sparse(local, rows, keep=keep)
    local, shape, device = local.detach(), local.shape[1:], carrying_device(local)
    whole = torch.empty((rows.rows if keep else 0, *shape), dtype=local.dtype)
    step = chunk_rows(local)
    for rank in range(comm.world_size()):
        start, length = share(rows.rows, rank, comm.world_size())
        for first in range(0, length, step):
            count = min(step, length - first)
            if rank == comm.rank():
                piece = local[first : first + count].contiguous().to(device)
            else:
                piece = local.new_empty((count, *shape), device=device)
            comm.broadcast(piece, rank)
            if keep:
                whole[start + first : start + first + count] = piece
    return whole


def chunk_rows(table: Tensor) -> int:
    """Return the number of rows of `table` per broadcast."""
    row_bytes = table.shape[1:].numel() * table.element_size()
    return max(1, CHUNK_BYTES // max(1, row_bytes))


def sparse_rows(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Return a coalesced sparse tensor with rows `values` (k, ...) at the sorted, distinct indices `ids` (k)."""
    return torch.sparse_coo_tensor(ids.unsqueeze(0), values, shape, check_invariants=False, is_coalesced=True)


def _full_sparse(local: Tensor, rows: Rows, *, keep: bool) -> Tensor:
    """Gather sparse row-wise state, such as SGD's momentum of sparse gradients."""
    local = local.detach().to(carrying_device(local)).coalesce()
    ids, values = local.indices()[0] + rows.start, local.values()
    shape = torch.Size([rows.rows if keep else 0, *local.shape[1:]])
    found: list[tuple[Tensor, Tensor]] = []
    for rank in range(comm.world_size()):
        count = torch.tensor([len(ids)], device=ids.device)
        comm.broadcast(count, rank)
        mine = rank == comm.rank()
        their_ids = ids if mine else ids.new_empty(int(count))
        their_values = values if mine else values.new_empty((int(count), *values.shape[1:]))
        comm.broadcast(their_ids, rank)
        comm.broadcast(their_values, rank)
        if keep:
            found.append((their_ids.cpu(), their_values.cpu()))
    if not keep:
        return sparse_rows(ids[:0].cpu(), values[:0].cpu(), shape)
    return sparse_rows(torch.cat([one for one, _ in found]), torch.cat([one for _, one in found]), shape)
