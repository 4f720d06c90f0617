"""Equal initial weights on all ranks, whatever their seeds.

torch ensures this for DistributedDataParallel only: `fully_shard` shards each rank's own initial values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale import comm, compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.rows import global_shape, rows_of
from lightning_largescale.workload.kinds import is_plain

# Smaller tensors share a broadcast of about this size: a broadcast of few bytes costs as much as one of many.
_BUCKET_BYTES = 16 * 2**20


def check_equal_structure(module: nn.Module) -> None:
    """Check that all ranks built the same module; otherwise their collectives would not match, and would hang.

    Raises:
        PlanError: On all ranks, when a parameter's or buffer's name, shape or dtype, or the number of elements of a
            sparse one, differs from rank 0's.
    """
    own = [
        f"{name} {_shapes(tensor)} {tensor.dtype}"
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]
    digest = hashlib.sha256("\n".join(own).encode()).hexdigest()
    digests = comm.all_gather_object(digest)
    if len(set(digests)) > 1:
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise PlanError(
            f"{type(module).__name__} has other parameters or buffers on rank {different[0]} than on rank 0;"
            " build the same module on every rank."
        )


def _shapes(tensor: torch.Tensor) -> list[tuple[int, ...]]:
    """Return the global shape of a tensor, or the shapes of the dense parts of one that is not dense."""
    if isinstance(tensor, DTensor) or tensor.is_meta or is_plain(tensor):
        return [tuple(global_shape(tensor))]
    return [tuple(part.shape) for part in compat.dense_parts(tensor)]


def equal_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Broadcast rank 0's values of `tensors` to all ranks, in place: a collective.

    Sharded, meta and empty tensors are skipped. Tensors are sent as bytes, since not every backend
    supports every dtype.
    """
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor) or rows_of(tensor) is not None or tensor.is_meta or tensor.numel() == 0:
            continue
        for data in map(_distinct, compat.dense_parts(tensor.detach())):
            if data.nbytes >= _BUCKET_BYTES and data.is_contiguous() and not data.is_conj() and not data.is_neg():
                comm.broadcast(_as_bytes(data))
                continue
            bucket.append(data)
            if sum(waiting.nbytes for waiting in bucket) >= _BUCKET_BYTES:
                _broadcast_together(bucket)
                bucket.clear()
    _broadcast_together(bucket)


def _broadcast_together(bucket: list[torch.Tensor]) -> None:
    if not bucket:
        return
    flat = torch.cat([_as_bytes(tensor) for tensor in bucket])
    comm.broadcast(flat)
    start = 0
    for tensor in bucket:
        # A clone is aligned for the dtype; a slice of the bytes may start anywhere.
        values = flat[start : start + tensor.nbytes].clone()
        tensor.copy_(values.view(tensor.dtype).view(tensor.shape))
        start += tensor.nbytes


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of `tensor` without the expanded dimensions (stride 0), whose elements share memory."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
