"""Checkpoint directories: each rank writes and reads its own chunks of full tensors.

The format is that of torch.distributed.checkpoint, in the layout of Lightning's ModelParallelStrategy: tensors under
"state_dict" by the user's names, each optimizer's state under "optimizer_0" and so on by parameter names, and all
objects that are not tensors in a file beside them.

Source: torch.distributed.checkpoint; lightning.pytorch.strategies.ModelParallelStrategy.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
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

from lightning_largescale import comm, compat
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import let_rest
from lightning_largescale.parallel.chunks import Chunk, chunks_of, in_boxes, is_divided
from lightning_largescale.parallel.rows import global_shape
from lightning_largescale.parallel.stored import Stored
from lightning_largescale.workload.kinds import is_plain

_STATE, _OPTIMIZERS, _OPTIMIZER, _SCHEDULERS = "state_dict", "optimizer_states", "optimizer_", "lr_schedulers"
# Key of sharded tensors that callbacks and hooks put elsewhere in a checkpoint, and of the placeholder in their place.
_OTHERS, _TAKEN_OUT = "tensors", "lightning_largescale.tensor"
_REST, _METADATA = "meta.pt", ".metadata"
# Keys in the file of the rest. The states are kept with tensor names as placeholders, because torch drops empty
# containers and turns all keys into strings. Also kept are the optimizers' classes.
EXTRA, _STATES, OPTIMIZERS = "lightning_largescale", "states", "optimizers"
# Bytes of a tensor that are written, and so read, at once.
_BOX_BYTES = 64 * 2**20
# Globals that a directory's pickled metadata may name, beside dtypes and torch.distributed.checkpoint.metadata.
_OF_METADATA = {
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *compat.pickled_globals(),
}
# Name parts of the directory that is being written, and of the one that is being replaced.
_HIDDEN = ("unfinished", "replaced")


def save_directory(checkpoint: Mapping[str, Any], path: Path, *, optimizers: Sequence[Sequence[str]] = ()) -> None:
    """Write `checkpoint`, whose tensors may be sharded, into a directory: a collective.

    The directory is written beside `path` and renamed to it when complete; a previous checkpoint at `path` is removed
    then.

    Args:
        checkpoint: a checkpoint as Lightning makes it, with optimizer states by parameter names; the same on all ranks
            except for the shards of tensors. All that is not sharded is written by rank 0.
        path: a path on a file system that all ranks share, the same on all ranks.
        optimizers: class names of each optimizer.

    Raises:
        PlanError: `path` is a folder of something else, or rank 0 fails to write there.
    """
    others: dict[str, Tensor] = {}
    rest = {key: value for key, value in checkpoint.items() if key not in (_STATE, _OPTIMIZERS)}
    rest = _taken_out(rest, (), others)
    states: dict[str, Any] = {_STATE: checkpoint.get(_STATE, {})}
    states |= {f"{_OPTIMIZER}{index}": state for index, state in enumerate(checkpoint.get(_OPTIMIZERS, ()))}
    rest[EXTRA] = {_STATES: _named(states, ()), OPTIMIZERS: [*map(list, optimizers)]}
    unfinished, replaced = (_hidden(path, kind) for kind in _HIDDEN)

    def begin() -> None:
        _check_writable(path)
        for left in (unfinished, replaced):
            _remove(left)
        unfinished.mkdir(parents=True)
        torch.save(rest, unfinished / _REST)

    def end() -> None:
        if path.exists() or path.is_symlink():
            path.rename(replaced)
        unfinished.rename(path)
        _remove(replaced)

    try:
        comm.run_on_rank_zero(begin, "write the checkpoint")
        writer = FileSystemWriter(unfinished)
        save({**states, _OTHERS: others}, storage_writer=writer, planner=_SavePlanner())
        comm.run_on_rank_zero(end, "write the checkpoint")
    finally:
        if comm.rank() == 0:
            _remove(unfinished)


def load_directory(path: Path, *, weights_only: bool | None = None, device: str = "cpu") -> dict[str, Any]:
    """Load a checkpoint as Lightning makes it, with lazily read tensors and optimizer states by parameter names.

    Args:
        path: a directory written by `save_directory`, by ModelParallelStrategy or by FSDPStrategy.
        weights_only: as in torch.load, for all objects that are not tensors.
        device: as in `Stored`.

    Raises:
        PlanError: the directory is incomplete, or no checkpoint.
    """
    directory = _Directory(path, weights_only=weights_only, device=device)
    checkpoint: dict[str, Any] = torch.load(path / _REST, map_location="cpu", weights_only=weights_only)
    extra = checkpoint.pop(EXTRA, {})
    states = _put_back(extra[_STATES], directory.value) if _STATES in extra else directory.states()
    checkpoint = _put_back(checkpoint, lambda name: directory.value(f"{_OTHERS}.{name}"))
    checkpoint[_STATE] = states.pop(_STATE, {})
    optimizers = sorted((key for key in states if key.startswith(_OPTIMIZER)), key=lambda key: int(key[10:]))
    # A checkpoint of weights alone has neither optimizers nor schedulers.
    if optimizers or _SCHEDULERS in checkpoint:
        checkpoint[_OPTIMIZERS] = [{"state": {}, **states[key]} for key in optimizers]
    if extra.get(OPTIMIZERS):
        checkpoint[EXTRA] = {OPTIMIZERS: extra[OPTIMIZERS]}
    return checkpoint


def is_directory(path: Path) -> bool:
    """Return whether a directory holds a checkpoint."""
    return (path / _METADATA).is_file()


@contextlib.contextmanager
def replacing_directory(path: str | Path) -> Iterator[None]:
    """Context in which a file is written to `path`; a directory there that holds a checkpoint is removed at its end.

    A file system would move the file into the directory, from which the previous checkpoint would still be read.
    """
    path = Path(path)
    if not is_directory(path):
        yield
        return
    replaced = _hidden(path, _HIDDEN[1])
    _remove(replaced)
    path.rename(replaced)
    try:
        yield
    except BaseException:
        if not path.exists():
            replaced.rename(path)
        raise
    _remove(replaced)


class _SavePlanner(DefaultSavePlanner):
    """Save planner that writes this rank's chunks of each sharded tensor; rank 0 writes all that is not sharded."""

    _written: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        self._boxes: dict[tuple[str, torch.Size], Tensor] = {}
        tensors = {name: value for name, value in self.state_dict.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in self.state_dict.items() if name not in tensors}
        items = list(create_default_local_save_plan(rest, self.is_coordinator).items) if self.is_coordinator else []
        for name in [name for name, value in tensors.items() if not is_divided(value) and not is_plain(value)]:
            # Tensors that are not plain (sparse, quantized, subclasses) are pickled, as in torch.save, not in boxes.
            del tensors[name]
            items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)] if self.is_coordinator else []
        for name, tensor in tensors.items():
            if is_divided(tensor) or self.is_coordinator:
                items += self._writes(name, tensor)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.offset is None:
            return self.state_dict[index.fqn]
        return self._boxes[index.fqn, index.offset]

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the data to write next, and release the memory of what was written before."""
        if self._written is not None:
            let_rest(self._written)
        found: Tensor | io.BytesIO = super().resolve_data(write_item)
        self._written = found if isinstance(found, Tensor) else None
        return found

    def _writes(self, name: str, tensor: Tensor) -> Iterator[WriteItem]:
        shape, properties = global_shape(tensor), TensorProperties(dtype=tensor.dtype)
        boxes = [box for chunk in chunks_of(tensor) for box in in_boxes(chunk, _BOX_BYTES)]
        if 0 in shape and self.is_coordinator:
            # A tensor without elements is saved all the same.
            boxes = [Chunk((0,) * len(shape), torch.empty(shape, dtype=tensor.dtype))]
        for box in boxes:
            chunk = _metadata_of(box)
            self._boxes[name, chunk.offsets] = box.values
            data = TensorWriteData(chunk=chunk, properties=properties, size=shape)
            yield WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(DefaultLoadPlanner):
    """Load planner that reads tensors into chunks, or pickled bytes into `loaded`."""

    def __init__(self, chunks: Sequence[Chunk] = (), *, weights_only: bool | None = None) -> None:
        super().__init__()
        self._weights_only = weights_only
        self._chunks = {torch.Size(chunk.offsets): chunk.values for chunk in chunks}
        self.loaded: Any = None

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._chunks[index.offset]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.loaded = torch.load(value, weights_only=self._weights_only)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that accepts only globals that describe tensors, because a pickle may call whatever it names."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name in ("dict", "list", "set", "tuple", "int", "str", "bytes", "slice"):
            return super().find_class(module, name)
        if (module, name) in _OF_METADATA or module in ("torch.distributed.checkpoint.metadata", "pathlib"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which tells of no tensor")


class _Directory:
    """A checkpoint directory of torch.distributed.checkpoint.

    Raises:
        PlanError: the directory is incomplete.
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
            with (path / _METADATA).open("rb") as file:
                unpickler = pickle.Unpickler if weights_only is False else _MetadataUnpickler
                self._metadata: Metadata = unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise PlanError(
                f"checkpoint {str(path)!r} has a damaged {_METADATA!r} ({error}); resume from another one."
            ) from error
        self._check_files()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def states(self) -> dict[str, Any]:
        """Return all contents in nested dicts and lists, as far as torch has kept these."""
        paths: Mapping[str, tuple[str | int, ...]] = self._metadata.planner_data or {}
        found: dict[str, Any] = {}
        # `paths` comes first because it has the module's order; the metadata has the order of the writers.
        for name in dict.fromkeys((*paths, *self._metadata.state_dict_metadata)):
            _set(found, paths.get(name) or tuple(name.split(".", 1)), self.value(name))
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

    def value(self, name: str) -> Any:
        """Return what is saved under a name: a lazily read tensor, or an object."""
        stored = self._metadata.state_dict_metadata[name]
        if isinstance(stored, BytesStorageMetadata):
            index = MetadataIndex(name)
            nothing = torch.Size([])
            item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
            planner = _LoadPlanner(weights_only=self._weights_only)
            self._reader.read_data(LoadPlan([item]), planner).wait()
            return planner.loaded
        return Stored(stored.size, stored.properties.dtype, partial(self._read, name), self._device)

    def _read(self, name: str, chunks: Sequence[Chunk]) -> None:
        stored: Any = self._metadata.state_dict_metadata[name]
        items = create_read_items_for_chunk_list(name, stored, [_metadata_of(chunk) for chunk in chunks])
        self._reader.read_data(LoadPlan(items), _LoadPlanner(chunks)).wait()


def _metadata_of(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=chunk.values.shape)


def _taken_out(value: Any, path: tuple[str, ...], others: dict[str, Tensor]) -> Any:
    """Move the sharded tensors of `value` into `others`; return `value` with placeholders that hold their names."""
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


def _named(value: Any, path: tuple[str, ...]) -> Any:
    """Return `value` with each tensor replaced by a placeholder that holds the name under which torch saves it."""
    if isinstance(value, Tensor):
        return {_TAKEN_OUT: ".".join(path)}
    if isinstance(value, dict):
        return {key: _named(one, (*path, str(key))) for key, one in value.items()}
    if isinstance(value, list):
        return [_named(one, (*path, str(index))) for index, one in enumerate(value)]
    return value


def _put_back(value: Any, named: Callable[[str], Any]) -> Any:
    """Return `value` with each placeholder replaced by what `named` returns for its name."""
    if isinstance(value, dict):
        if value.keys() == {_TAKEN_OUT}:
            return named(value[_TAKEN_OUT])
        made = {key: _put_back(one, named) for key, one in value.items()}
        return made if any(made[key] is not one for key, one in value.items()) else value
    if type(value) in (list, tuple):
        items = [_put_back(one, named) for one in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _hidden(path: Path, kind: str) -> Path:
    # Callbacks find checkpoints by parts of their names, which this name must not contain.
    return path.with_name(f".{kind}-{zlib.crc32(path.name.encode()):08x}")


def _check_writable(path: Path) -> None:
    if path.is_dir() and not (path / _METADATA).exists() and any(path.iterdir()):
        raise PlanError(f"{str(path)!r} is a folder that is no checkpoint; give the checkpoint a path of its own.")


def _set(found: dict[Any, Any], path: Sequence[str | int], value: Any) -> None:
    for key in path[:-1]:
        found = found.setdefault(key, {})
    found[path[-1]] = value


def _as_lists(value: Any) -> Any:
    """Return `value` with dicts of integer keys replaced by lists."""
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
