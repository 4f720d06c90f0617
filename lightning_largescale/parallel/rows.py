"""Rows of a table that one rank holds: a plain local parameter, marked with which piece of the whole it is.

The mark is an attribute of the tensor, as the gradient of such a parameter has it too. Whatever leaves or enters the
ranks as a whole (checkpoints, full parameters) goes through `full_rows` and `own_rows`.
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
# Rows travel in pieces of about as many bytes, so that no rank holds much beside its own.
CHUNK_BYTES = 16 * 2**20

_Tensor = TypeVar("_Tensor", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a table a local tensor has, as many as it is long.

    Attributes:
        rows: of the whole table.
        start: number of the first of this rank.
    """

    rows: int
    start: int


def rows_of(tensor: object) -> Rows | None:
    """What piece of a table `tensor`, a parameter or its gradient, is; None where it is whole, or no tensor."""
    mark = getattr(tensor, _ATTRIBUTE, None)
    return None if mark is None else Rows(*mark)


def mark_rows(tensor: _Tensor, rows: Rows) -> _Tensor:
    """`tensor`, told that it is a piece of a table."""
    # Numbers, which torch.load takes for safe, and knows in a process without this package.
    setattr(tensor, _ATTRIBUTE, (rows.rows, rows.start))
    return tensor


def global_shape(tensor: Tensor) -> torch.Size:
    """The shape of the table that `tensor` is a piece of; its own where it is none."""
    rows = rows_of(tensor)
    return tensor.shape if rows is None else torch.Size([rows.rows, *tensor.shape[1:]])


def own_rows(full: Tensor, rows: Rows) -> Tensor:
    """This rank's rows of `full`, a table or its row-wise state, without communication.

    Args:
        full: equal on all ranks, of shape (rows, ...), dense or sparse COO; on any device.
        rows: of this rank's piece.
    """
    _, length = share(rows.rows, comm.rank(), comm.world_size())
    if not full.is_sparse:
        # Or the whole would stay in memory behind the piece.
        return full.narrow(0, rows.start, length).clone(memory_format=torch.contiguous_format)
    full = full.coalesce()
    ids = full.indices()[0]
    own = (ids >= rows.start) & (ids < rows.start + length)
    return sparse_rows(ids[own] - rows.start, full.values()[own], torch.Size([length, *full.shape[1:]]))


def full_rows(local: Tensor, rows: Rows, *, keep: bool = True) -> Tensor:
    """The whole table, or its row-wise state, that ranks have pieces of: a collective.

    Args:
        local: this rank's piece, dense or sparse COO, alike on all ranks, on any device.
        rows: of it.
        keep: whether this rank wants the whole.

    Returns:
        A dense or sparse tensor of shape (rows, ...) on the CPU; without `keep` one that is empty.
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
    """How many rows of `table` travel together."""
    row_bytes = table.shape[1:].numel() * table.element_size()
    return max(1, CHUNK_BYTES // max(1, row_bytes))


def sparse_rows(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A sparse tensor of rows, each once: `values` (k, ...) at the places `ids` (k), which are sorted."""
    return torch.sparse_coo_tensor(ids.unsqueeze(0), values, shape, check_invariants=False, is_coalesced=True)


def _full_sparse(local: Tensor, rows: Rows, *, keep: bool) -> Tensor:
    """What optimizers keep of sparse gradients, such as SGD's momentum."""
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
