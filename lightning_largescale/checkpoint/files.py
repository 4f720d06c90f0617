"""Weights in safetensors files, with or without an index, and in torch files: memory-mapped and read by slices.

Source: safetensors.safe_open; torch.load(mmap=True).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_largescale.checkpoint.directory import is_directory, load_directory
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import expect_pages, forget_pages
from lightning_largescale.parallel.chunks import Chunk, in_boxes
from lightning_largescale.parallel.stored import Stored

# Bytes of a file that are in memory at once, beside the memory they are read into.
_BOX_BYTES = 32 * 2**20
# Dtypes by their names in safetensors.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# Number of names shown in an error.
_MOST = 10
# Name of the index of published weights (which file holds which tensor), and key of a Lightning checkpoint's tensors.
_INDEX, _STATE = "*.index.json", "state_dict"


def stored_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of weight files by name, to be read lazily.

    Args:
        path: a safetensors file; an index of several (".index.json"), or a folder with an index or with safetensors
            files; a file that torch.save wrote of tensors by name, or of a checkpoint with these as its "state_dict"; a
            checkpoint directory.

    Raises:
        PlanError: there is no such file, or it is truncated or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        if is_directory(path):
            return dict(load_directory(path, weights_only=True)[_STATE])
        indices = sorted(path.glob(_INDEX))
        files = sorted(path.glob("*.safetensors"))
        if len(indices) > 1 or not (indices or files):
            raise PlanError(
                f"weights={str(path)!r} is a folder with {len(indices)} indices and {len(files)} files of safetensors;"
                " give a folder with one index or with such files, or the path of a file."
            )
        return _of_index(indices[0]) if indices else _of_files(files)
    if not path.is_file():
        raise PlanError(f"weights={str(path)!r} is not there; give the path of a file or folder with weights.")
    if path.suffix == ".json":
        return _of_index(path)
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def load_file(path: str | Path, *, weights_only: bool | None = None, device: str = "cpu") -> Any:
    """Load what torch.save wrote, with lazily read tensors.

    Args:
        path: a file for which `is_mappable` is true.
        weights_only: as in torch.load.
        device: as in `Stored`.
    """
    loaded = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    return apply_to_collection(loaded, Tensor, partial(_stored, device=device))


def is_mappable(path: object) -> bool:
    """Return whether `path` is a local file in torch.save's zip format, which old versions of torch did not write."""
    return isinstance(path, str | Path) and is_zipfile(path)


def is_truncated(path: object) -> bool:
    """Return whether `path` is a local file that begins as torch.save's files do, but does not end so."""
    if not isinstance(path, str | Path) or not Path(path).is_file() or is_zipfile(path):
        return False
    with Path(path).open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_remote(path: str | Path) -> bool:
    """Return whether `path` is on a file system that is not mounted locally."""
    return not isinstance(get_filesystem(path), LocalFileSystem)


def _stored(values: Tensor, device: str = "cpu") -> Tensor:
    plain = type(values) in (Tensor, nn.Parameter)
    if not plain or values.layout is not torch.strided or values.is_quantized:
        return values
    values = values.detach()
    return Stored(values.shape, values.dtype, partial(_read_mapped, lambda box: values[box]), device)


def _of_torch(path: Path) -> dict[str, Tensor]:
    try:
        found = load_file(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise PlanError(
            f"weights={str(path)!r} holds objects beside tensors, or is no file of torch.save, and files of weights are"
            " read without running what they name; save the state_dict by itself."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise PlanError(
            f"weights={str(path)!r} is not a file of safetensors, and torch.load does not read it"
            f" ({str(error).splitlines()[0]}); give one of safetensors or one that torch.save wrote of tensors."
        ) from error
    state = found.get(_STATE, found) if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PlanError(
            f"weights={str(path)!r} does not hold tensors by name; give a file with a state_dict, or a checkpoint that"
            f" has one as {_STATE!r}."
        )
    return dict(state)


def _of_index(path: Path) -> dict[str, Tensor]:
    try:
        names: dict[str, str] = json.loads(path.read_text())["weight_map"]
        files = sorted({path.parent / name for name in names.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{str(path)!r} is not an index of weights ({error!r}); it has no readable 'weight_map'."
        ) from error
    for name in names.values():
        if Path(name).name != name:
            raise PlanError(f"{str(path)!r} names {name!r}, which is no file beside it; get it from who made it anew.")
    for file in files:
        if not file.is_file():
            raise PlanError(f"{str(path)!r} names {file.name!r}, which is not there; put all of its files beside it.")
    found = _of_files(files)
    if missing := [name for name in names if name not in found]:
        raise PlanError(
            f"{str(path)!r} names {listed(missing)} and its files do not have them; get index and files of one release."
        )
    return {name: found[name] for name in names}


def _of_files(files: Sequence[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        own = _of_safetensors(file) if file.suffix == ".safetensors" else _of_torch(file)
        if twice := found.keys() & own.keys():
            raise PlanError(f"{str(file)!r} has {listed(sorted(twice))}, which another file of that folder has too.")
        found |= own
    return found


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # Slices are a fallback only: the tensors that the library makes of them have the system read megabytes from the
        # start of each tensor on.
        opened: Any = safe_open(path, framework="pt")
        header = _header(path)
        slices = {name: opened.get_slice(name) for name in header}
    except (SafetensorError, OSError) as error:
        raise PlanError(
            f"weights={str(path)!r} is truncated or not a file of safetensors ({error}); get it anew."
        ) from error
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {name: _stored_slice(data, *header[name], slices[name]) for name in header}


def _header(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Return the header of a valid safetensors file: dtype, shape, and start and end offset of the values, by name.

    Source: the format's description, github.com/huggingface/safetensors.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors: dict[str, Any] = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    begin = 8 + length
    return {
        name: (one["dtype"], one["shape"], *(begin + offset for offset in one["data_offsets"]))
        for name, one in tensors.items()
    }


def _stored_slice(data: Tensor, kind: str, shape: list[int], start: int, end: int, one: Any) -> Tensor:
    dtype = _DTYPES.get(kind)
    if dtype is None or start % dtype.itemsize:
        none = one[:0] if shape else one[...]
        return Stored(shape, none.dtype, partial(_read_mapped, lambda box: one[box] if box else one[...]))
    return _stored(data[start:end].view(dtype).view(shape))


def _read_mapped(slice_of: Callable[[tuple[slice, ...]], Tensor], chunks: Sequence[Chunk]) -> None:
    """Copy boxes of a memory-mapped tensor into `chunks`, releasing its pages after each."""
    for chunk in chunks:
        for box in in_boxes(chunk, _BOX_BYTES):
            sides = zip(box.offsets, box.values.shape, strict=True)
            values = slice_of(tuple(slice(start, start + size) for start, size in sides))
            expect_pages(values)
            box.values.copy_(values)
            forget_pages(values)


def listed(names: Sequence[str], shown: Callable[[str], str] = repr) -> str:
    """Return the first ten names, and how many more there are."""
    first = ", ".join(map(shown, names[:_MOST]))
    return f"{first} and {len(names) - _MOST} more" if len(names) > _MOST else first
