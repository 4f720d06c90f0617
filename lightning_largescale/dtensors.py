"""Local shards of tensors that may be DTensors."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_of(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, sharing storage; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
