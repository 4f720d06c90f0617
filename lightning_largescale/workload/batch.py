"""Helpers for nested batches: find, replace, measure and slice their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lightning_largescale import compat


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Replace each tensor of `batch` by `change(tensor)`; dicts, lists, tuples and dataclasses are rebuilt."""
    return apply_to_collection(batch, torch.Tensor, change, allow_frozen=True)


def tensors_in(batch: Any) -> list[torch.Tensor]:
    """Return the tensors of `batch` in order; a tensor that occurs twice is listed twice."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def digest_of(batch: Any) -> str:
    """Return a SHA-256 digest of the tensors of `batch`: shapes, dtypes and, of strided tensors, values."""
    digest = hashlib.sha256()
    for tensor in tensors_in(batch):
        digest.update(f"{tensor.shape} {tensor.dtype}".encode())
        if tensor.layout is torch.strided:
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def batch_samples(batch: Any) -> int:
    """Return the number of samples of `batch`.

    This is the number of sequences in the last PackedSequence, or else the size of the first dimension of the first
    tensor where it is not 0. It is 1 when there is neither.
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
    """Return the total bytes of the tensors of `batch`."""
    return sum(map(tensor_bytes, tensors_in(batch)))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the elements of `tensor`; of a sparse tensor, the bytes that it stores."""
    return sum(part.numel() * part.element_size() for part in compat.dense_parts(tensor))


def first_samples(batch: Any, count: int) -> Any:
    """Slice packed sequences, and tensors whose first dimension is the batch size, to the first `count` samples."""
    samples = batch_samples(batch)

    def cut(found: Any) -> Any:
        if isinstance(found, PackedSequence):
            return pack_sequence(unpack_sequence(found)[:count], enforce_sorted=found.sorted_indices is None)
        return found[:count] if found.dim() and found.shape[0] == samples else found

    return apply_to_collection(batch, (torch.Tensor, PackedSequence), cut, allow_frozen=True)
