"""Weights that the user gives a strategy, matched to the tensors of a module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from lightning_largescale.checkpoint.files import listed, stored_weights
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.rows import global_shape
from lightning_largescale.workload.blocks import no_such_module

# A path, or paths by submodule names.
Weights: TypeAlias = str | Path | Mapping[str, str | Path]


def check_weights(weights: object) -> None:
    """Check that `weights` names files.

    Raises:
        PlanError: `weights` is neither None, a path, nor paths by submodule names.
    """
    paths = list(weights.items()) if isinstance(weights, Mapping) else [("", weights)]
    if weights is not None and not all(isinstance(one, str | Path) and isinstance(name, str) for name, one in paths):
        raise PlanError(
            f"weights={weights!r} names no files; give a path, or paths by names of parts of the module, such as"
            " {'model': 'model.safetensors'}."
        )


def read_weights(
    module: nn.Module, weights: Weights | None, *, strict: bool = True, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return lazily read tensors for the parameters and buffers of `module`, by their first names.

    Args:
        module: the module, materialized or not, sharded or not.
        weights: path of the weights of the full module, or paths by submodule names; None gives no tensors.
        strict: whether missing and unexpected names are errors; other shapes always are.
        without: names of tensors that get their values elsewhere.

    Raises:
        PlanError: names or shapes differ from the module's; one error lists all of a file's.
    """
    found: dict[str, Tensor] = {}
    for prefix, path in (weights if isinstance(weights, Mapping) else {"": weights}).items():
        if path is not None:
            found |= _for_part(module, prefix, path, strict=strict)
    elsewhere = {id(tensor) for name, tensor in _saved_tensors(module).items() if name in without}
    tensors = _saved_tensors(module)
    return {name: one for name, one in found.items() if id(tensors[name]) not in elsewhere}


def _for_part(module: nn.Module, prefix: str, path: str | Path, *, strict: bool) -> dict[str, Tensor]:
    paths = dict(module.named_modules())
    if prefix not in paths:
        raise no_such_module("weights", prefix, module, paths)
    part = module.get_submodule(prefix)
    stored = stored_weights(path)
    targets = _saved_tensors(part)
    # Files have one or all of tied tensors.
    names: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        names.setdefault(id(tensor), []).append(name)
    missing = [tied[0] for tied in names.values() if not any(name in stored for name in tied)]
    unexpected = [name for name in stored if name not in targets]
    other_shapes = [
        f"{name!r} is {tuple(stored[name].shape)} and should be {tuple(global_shape(tensor))}"
        for name, tensor in targets.items()
        if name in stored and stored[name].shape != global_shape(tensor)
    ]
    wrong = []
    if missing and strict:
        wrong.append(f"{len(missing)} missing ({listed(missing)})")
    if unexpected and strict:
        wrong.append(f"{len(unexpected)} unexpected ({listed(unexpected)})")
    if other_shapes:
        wrong.append(f"{len(other_shapes)} of another shape ({listed(other_shapes, str)})")
    if wrong:
        raise PlanError(
            f"weights={str(path)!r} does not fit {prefix or type(module).__name__}: {', '.join(wrong)}; give the"
            " weights of this model, under its own names."
        )
    dot = f"{prefix}." if prefix else ""
    given = {tied[0]: next((stored[name] for name in tied if name in stored), None) for tied in names.values()}
    return {dot + name: one for name, one in given.items() if one is not None}


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers in `state_dict`, under all of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    saved = module.state_dict(keep_vars=True).keys()
    return {name: tensor for name, tensor in (parameters | buffers).items() if name in saved}
