"""Batches of any shape: tensors found, replaced, counted and cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_largescale import compat


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`batch` with `change(tensor)` in place of each tensor; dicts, lists, tuples and dataclasses are rebuilt."""
    return apply_to_collection(batch, torch.Tensor, change, allow_frozen=True)


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """The tensors of `batch`, in order; one that stands there twice is there twice."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def batch_samples(batch: Any) -> int:
    """Size of the first dimension of the first tensor that has one; 1 when none has."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim() and tensor.shape[0]), 1)


def batch_bytes(batch: Any) -> int:
    """Bytes of the tensors of `batch`."""
    return sum(map(tensor_bytes, tensors_in(batch)))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of `tensor`, of a sparse one those that it has."""
    return sum(part.numel() * part.element_size() for part in compat.dense_parts(tensor))


def first_samples(batch: Any, count: int) -> Any:
    """The first `count` samples: tensors whose first dimension is that of the batch are cut."""
    samples = batch_samples(batch)
    return map_tensors(batch, lambda tensor: tensor[:count] if tensor.dim() and tensor.shape[0] == samples else tensor)
