"""Batches of any shape: tensors found, replaced, counted and cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

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


def digest_of(batch: Any) -> str:
    """A digest of the tensors of `batch`: values, shapes and dtypes; of those without strides no values."""
    digest = hashlib.sha256()
    for tensor in tensors_in(batch):
        digest.update(f"{tensor.shape} {tensor.dtype}".encode())
        if tensor.layout is torch.strided:
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def batch_samples(batch: Any) -> int:
    """Sequences in the first PackedSequence, or else the size of the first dimension of the first tensor that has one.

    1 when there is neither.
    """
    sizes: list[int] = []

    def note(found: Any) -> Any:
        if isinstance(found, PackedSequence):
            sizes.insert(0, int(found.batch_sizes[0]))
        elif found.dim() and found.shape[0]:
            sizes.append(found.shape[0])
        return found

    apply_to_collection(batch, (torch.Tensor, PackedSequence), note, allow_frozen=True)
    return next(iter(sizes), 1)


def batch_bytes(batch: Any) -> int:
    """Bytes of the tensors of `batch`."""
    return sum(map(tensor_bytes, tensors_in(batch)))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of `tensor`, of a sparse one those that it has."""
    return sum(part.numel() * part.element_size() for part in compat.dense_parts(tensor))


def first_samples(batch: Any, count: int) -> Any:
    """The first `count` samples: tensors whose first dimension is that of the batch are cut, and packed sequences."""
    samples = batch_samples(batch)

    def cut(found: Any) -> Any:
        if isinstance(found, PackedSequence):
            return pack_sequence(unpack_sequence(found)[:count], enforce_sorted=found.sorted_indices is None)
        return found[:count] if found.dim() and found.shape[0] == samples else found

    return apply_to_collection(batch, (torch.Tensor, PackedSequence), cut, allow_frozen=True)
