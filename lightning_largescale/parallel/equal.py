"""The same initial weights on all ranks, whatever their seeds.

torch ensures it for DistributedDataParallel only: `fully_shard` takes each rank's slice of whatever that rank drew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_largescale.parallel.rows import global_shape, rows_of
from lightning_largescale.plan import PlanError

# Tensors smaller than this travel together, up to about as many bytes: a broadcast of few bytes costs as one of many.
_BUCKET_BYTES = 16 * 2**20


def check_equal_structure(module: nn.Module) -> None:
    """Refuse to go on where ranks built different modules: their collectives would not match, and wait for ever.

    Raises:
        PlanError: on all ranks, when a parameter's or buffer's name, shape or dtype differs from rank 0's, or when one
            is of a lazy module.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise PlanError(f"parameter {name!r} is of a lazy module, so it has no values; call the module once.")
    own = [
        f"{name} {tuple(global_shape(tensor))} {tensor.dtype}"
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]
    digest = hashlib.sha256("\n".join(own).encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise PlanError(
            f"{type(module).__name__} has other parameters or buffers on rank {different[0]} than on rank 0;"
            " build the same module on every rank."
        )


def equal_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's values of `tensors`, in place: a collective.

    What is sharded already, or has no values yet, is left alone.
    """
    small: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor) or rows_of(tensor) is not None or tensor.is_meta or tensor.numel() == 0:
            continue
        data = tensor.detach()
        if data.nbytes >= _BUCKET_BYTES and data.is_contiguous():
            dist.broadcast(data, src=0)
            continue
        bucket = small.setdefault(data.dtype, [])
        bucket.append(data)
        if sum(waiting.nbytes for waiting in bucket) >= _BUCKET_BYTES:
            _broadcast_together(bucket)
            bucket.clear()
    for bucket in small.values():
        _broadcast_together(bucket)


def _broadcast_together(bucket: list[torch.Tensor]) -> None:
    if not bucket:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.broadcast(flat, src=0)
    start = 0
    for tensor in bucket:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
