"""Checkpoint loading through Lightning: for `load_from_checkpoint`, and for strategies other than ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_largescale import compat
from lightning_largescale.checkpoint.directory import EXTRA, load_directory
from lightning_largescale.checkpoint.files import is_mappable, load_file
from lightning_largescale.checkpoint.optimizers import indexed_optimizer_state
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.deferred import active_recording
from lightning_largescale.parallel.stored import Stored


def load_checkpoint(
    load: Callable[..., Any], path: Any, *, map_location: Any = None, weights_only: bool | None = None
) -> Any:
    """Load a checkpoint file or directory, as Lightning's `load` loads a file.

    Tensors are read lazily, and only in part, if modules are built without values: under `torch.device("meta")`, and in
    `Trainer.init_module(empty_init=True)` of a strategy that shards.

    Args:
        load: the function that loads all but directories.
        path: a path of a file or directory, a URL, or an open file.
        map_location: as in torch.load; for a directory, a device or its name for all tensors, else the CPU.
        weights_only: as in torch.load.

    Raises:
        PlanError: a directory is not a checkpoint, or an incomplete one.
    """
    meta = torch.get_default_device().type == "meta"
    recorded = active_recording() is not None
    if isinstance(path, str | Path) and Path(path).is_dir():
        with compat.without_function_modes(), compat.without_dispatch_modes():
            loaded = load_directory(Path(path), weights_only=weights_only, device="meta" if meta else "cpu")
            loaded.pop(EXTRA, None)
            if "optimizer_states" in loaded:
                loaded["optimizer_states"] = [indexed_optimizer_state(one) for one in loaded["optimizer_states"]]
            return loaded if meta or recorded else _whole(loaded, map_location)
    if (meta or recorded) and is_mappable(path):
        with compat.without_function_modes(), compat.without_dispatch_modes():
            return load_file(path, weights_only=weights_only, device="meta" if meta else "cpu")
    return load(path, map_location=map_location, weights_only=weights_only)


def consolidate(directory: str | Path, file: str | Path) -> None:
    """Write the checkpoint in `directory` as a file with full tensors that stock Lightning reads.

    The whole checkpoint is in this process's memory at once.

    Args:
        directory: a directory that a sharded plan, or ModelParallelStrategy, saved.
        file: a path that does not exist yet.

    Raises:
        PlanError: `file` exists, or `directory` is not a checkpoint, or an incomplete one.
    """
    if Path(file).exists():
        raise PlanError(f"{str(file)!r} is there already; give a path where nothing is.")
    if not Path(directory).is_dir():
        raise PlanError(f"{str(directory)!r} is no directory; give a checkpoint that is one.")
    whole = load_checkpoint(torch.load, Path(directory), weights_only=False)
    unfinished = Path(file).with_name(f".{Path(file).name}.unfinished")
    torch.save(whole, unfinished)
    unfinished.rename(file)


def _whole(loaded: dict[str, Any], map_location: Any) -> Any:
    device = map_location if isinstance(map_location, str | torch.device) else "cpu"
    return apply_to_collection(loaded, Stored, lambda stored: stored.whole().to(device))
