"""Checkpoints that are directories: each rank writes and reads its own parts of tensors that stand there whole.

The format is that of torch.distributed.checkpoint, laid out as Lightning's ModelParallelStrategy does: tensors under
"state_dict" by the user's names, each optimizer's state under "optimizer_0" and so on by names of parameters, and all
that is no tensor in a file beside them.

Source: torch.distributed.checkpoint; lightning.pytorch.strategies.ModelParallelStrategy.
"""

from __future__ import annotations

import io
import pickle
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_largescale.parallel.pieces import Piece, in_boxes, is_divided, pieces_of
from lightning_largescale.parallel.rows import global_shape
from lightning_largescale.parallel.stored import Stored
from lightning_largescale.plan import PlanError

_STATE, _OPTIMIZERS, _OPTIMIZER = "state_dict", "optimizer_states", "optimizer_"
# Divided tensors that callbacks and hooks have put elsewhere in a checkpoint, and what stands there in their place.
_OTHERS, _TAKEN_OUT = "tensors", "lightning_largescale.tensor"
_REST, _METADATA = "meta.pt", ".metadata"
# Bytes of a tensor that are written, and so read again, in one.
_BOX_BYTES = 64 * 2**20


def save_directory(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write `checkpoint`, whose tensors may be divided, into a directory: a collective.

    It is written beside `path` and takes its name when it is whole; what had the name before is removed then.

    Args:
        checkpoint: as Lightning makes it, its optimizer states by names of parameters; the same on all ranks, but for
            the parts of tensors. What is not divided is rank 0's.
        path: on a file system that all ranks share, equal on all.
    """
    first = dist.get_rank() == 0
    others: dict[str, Tensor] = {}
    rest = {key: value for key, value in checkpoint.items() if key not in (_STATE, _OPTIMIZERS)}
    rest = _taken_out(rest, (), others)
    states: dict[str, Any] = {_STATE: checkpoint.get(_STATE, {}), _OTHERS: others}
    states |= {f"{_OPTIMIZER}{index}": state for index, state in enumerate(checkpoint.get(_OPTIMIZERS, ()))}
    # Callbacks look for checkpoints by parts of names, which this one must not have.
    unfinished = path.with_name(f".unfinished-{zlib.crc32(path.name.encode()):08x}")
    if first:
        _remove(unfinished)
        unfinished.mkdir(parents=True)
        torch.save(rest, unfinished / _REST)
    dist.barrier()
    save(states, storage_writer=FileSystemWriter(unfinished), planner=_SavePlanner())
    if first:
        _remove(path)
        unfinished.rename(path)
    dist.barrier()


def check_writable(path: Path) -> None:
    """Refuse to write a checkpoint in the place of other things.

    Raises:
        PlanError: `path` is a folder of something else.
    """
    if path.is_dir() and not (path / _METADATA).exists() and any(path.iterdir()):
        raise PlanError(f"{str(path)!r} is a folder that is no checkpoint; give the checkpoint a path of its own.")


def load_directory(path: Path, *, weights_only: bool | None = None, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint as Lightning makes it, with tensors to be read later and optimizer states by names of parameters.

    Args:
        path: written by `save_directory`, by ModelParallelStrategy or by FSDPStrategy.
        weights_only: as of torch.load, of what is no tensor.
        device: as of `Stored`.

    Raises:
        PlanError: it is not whole, or no such directory.
    """
    directory = _Directory(path, weights_only=weights_only, device=device)
    checkpoint: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    states = directory.states()
    others = states.pop(_OTHERS, {})
    checkpoint = _put_back(checkpoint, others)
    checkpoint[_STATE] = states.pop(_STATE, {})
    optimizers = sorted((key for key in states if key.startswith(_OPTIMIZER)), key=lambda key: int(key[10:]))
    if optimizers:
        checkpoint[_OPTIMIZERS] = [{"state": {}, **states[key]} for key in optimizers]
    return checkpoint


class _SavePlanner(DefaultSavePlanner):
    """Writes of each tensor the boxes that this rank has; of what is not divided, rank 0 writes all."""

    def create_local_plan(self) -> SavePlan:
        self._boxes: dict[tuple[str, torch.Size], Tensor] = {}
        tensors = {name: value for name, value in self.state_dict.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in self.state_dict.items() if name not in tensors}
        items = list(create_default_local_save_plan(rest, self.is_coordinator).items) if self.is_coordinator else []
        for name, tensor in tensors.items():
            if is_divided(tensor) or self.is_coordinator:
                items += self._writes(name, tensor)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.offset is None:
            return self.state_dict[index.fqn]
        return self._boxes[index.fqn, index.offset]

    def _writes(self, name: str, tensor: Tensor) -> Iterator[WriteItem]:
        properties = TensorProperties(dtype=tensor.dtype)
        for piece in pieces_of(tensor):
            for box in in_boxes(piece, _BOX_BYTES):
                chunk = _chunk(box)
                self._boxes[name, chunk.offsets] = box.values
                yield WriteItem(
                    index=MetadataIndex(name, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=global_shape(tensor)),
                )


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into pieces, or bytes into `loaded`."""

    def __init__(self, pieces: Sequence[Piece] = (), *, weights_only: bool | None = None) -> None:
        super().__init__()
        self._weights_only = weights_only
        self._pieces = {torch.Size(piece.offsets): piece.values for piece in pieces}
        self.loaded: Any = None

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._pieces[index.offset]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.loaded = torch.load(value, weights_only=self._weights_only)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return


class _Directory:
    """A directory of torch.distributed.checkpoint.

    Raises:
        PlanError: it is not whole.
    """

    def __init__(self, path: Path, *, weights_only: bool | None, device: str) -> None:
        self._path, self._weights_only, self._device = path, weights_only, device
        for name in (_METADATA, _REST):
            if not (path / name).is_file():
                raise PlanError(
                    f"checkpoint {str(path)!r} is half-written or none: it has no {name!r}; resume from another one."
                )
        self._reader = FileSystemReader(path)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise PlanError(
                f"checkpoint {str(path)!r} has a damaged {_METADATA!r} ({error}); resume from another one."
            ) from error
        self._check_files()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def states(self) -> dict[str, Any]:
        """All that is in it, in nested dicts and lists as it was saved."""
        paths: Mapping[str, tuple[str | int, ...]] = self._metadata.planner_data or {}
        found: dict[str, Any] = {}
        # In the order of the module; the other is that of who wrote what.
        for name in dict.fromkeys((*paths, *self._metadata.state_dict_metadata)):
            _set(found, paths.get(name) or tuple(name.split(".", 1)), self._value(name))
        return {key: _as_lists(value) for key, value in found.items()}

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self._path / name
            size = file.stat().st_size if file.is_file() else 0
            if size < end:
                raise PlanError(
                    f"checkpoint {str(self._path)!r} is not whole: {name!r} has {size} bytes of {end};"
                    " resume from another one."
                )

    def _value(self, name: str) -> Any:
        stored = self._metadata.state_dict_metadata[name]
        if isinstance(stored, BytesStorageMetadata):
            index = MetadataIndex(name)
            nothing = torch.Size([])
            item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
            planner = _LoadPlanner(weights_only=self._weights_only)
            self._reader.read_data(LoadPlan([item]), planner).wait()
            return planner.loaded
        return Stored(stored.size, stored.properties.dtype, partial(self._read, name), self._device)

    def _read(self, name: str, pieces: Sequence[Piece]) -> None:
        stored: Any = self._metadata.state_dict_metadata[name]
        items = create_read_items_for_chunk_list(name, stored, [_chunk(piece) for piece in pieces])
        self._reader.read_data(LoadPlan(items), _LoadPlanner(pieces)).wait()


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=piece.values.shape)


def _taken_out(value: Any, path: tuple[str, ...], others: dict[str, Tensor]) -> Any:
    """`value` with its divided tensors in `others`, and their names there in their places."""
    if is_divided(value):
        name = "/".join(path)
        others[name] = value
        return {_TAKEN_OUT: name}
    if isinstance(value, dict):
        made = {key: _taken_out(one, (*path, str(key)), others) for key, one in value.items()}
        return made if any(made[key] is not one for key, one in value.items()) else value
    if type(value) in (list, tuple):
        items = [_taken_out(one, (*path, str(index)), others) for index, one in enumerate(value)]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _put_back(value: Any, others: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TAKEN_OUT}:
            return others[value[_TAKEN_OUT]]
        return {key: _put_back(one, others) for key, one in value.items()} if others else value
    if type(value) in (list, tuple) and others:
        return type(value)(_put_back(one, others) for one in value)
    return value


def _set(found: dict[Any, Any], path: Sequence[str | int], value: Any) -> None:
    for key in path[:-1]:
        found = found.setdefault(key, {})
    found[path[-1]] = value


def _as_lists(value: Any) -> Any:
    """`value` with lists for the dicts that have places for keys."""
    if not isinstance(value, dict):
        return value
    made = {key: _as_lists(one) for key, one in value.items()}
    if made and all(isinstance(key, int) for key in made):
        return [made[key] for key in sorted(made)]
    return made


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
