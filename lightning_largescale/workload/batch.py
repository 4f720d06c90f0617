"""Helpers for nested batches: find, replace, measure and slice their tensors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
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
    """Return a SHA-256 digest of the data in `batch`; the empty string if there is none that can be compared.

    Data are tensors of every layout, arrays, text and numbers in nested containers, and the tensors and arrays in the
    attributes of other objects, whose text and numbers may name a rank.
    """
    digest = hashlib.sha256()
    state = {"count": 0}
    seen: set[int] = set()

    def take(data: bytes) -> None:
        state["count"] += 1
        digest.update(data)

    def note(value: Any, *, in_object: bool) -> None:
        if isinstance(value, torch.Tensor):
            for part in compat.dense_parts(value.detach()):
                values = part.resolve_conj().resolve_neg().cpu().contiguous().flatten().view(torch.uint8)
                take(f"{part.shape} {part.dtype}".encode() + values.numpy().tobytes())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            take(f"{value.shape} {value.dtype}".encode() + value.tobytes())
        elif isinstance(value, str | bytes | int | float | complex):
            if not in_object:
                take(repr(value).encode())
        elif isinstance(value, Mapping):
            for key, one in value.items():
                note(key, in_object=in_object)
                note(one, in_object=in_object)
        elif isinstance(value, list | tuple | np.ndarray):
            for one in value:
                note(one, in_object=in_object)
        elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
            seen.add(id(value))
            note(vars(value), in_object=not dataclasses.is_dataclass(value))

    note(batch, in_object=False)
    return digest.hexdigest() if state["count"] else ""


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
