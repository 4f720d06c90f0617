"""Tensor parallelism by the user's plan: torch's ParallelStyle objects by module name.

Source: torch.distributed.tensor.parallel.parallelize_module.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.equal import equal_weights


def check_styles(module: nn.Module, styles: Mapping[str, Any]) -> None:
    """Make sure that each key of `styles`, which may have wildcards, matches a module, and each value is a style.

    Raises:
        PlanError: a key matches no module, or a value is no ParallelStyle.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern, style in styles.items():
        if not isinstance(style, ParallelStyle):
            raise PlanError(
                f"tensor_parallel_plan has {style!r} for {pattern!r}; give an object of torch's ParallelStyle, such as"
                " ColwiseParallel()."
            )
        if not any(_matches(pattern, name) for name in names):
            near = min(names, key=lambda name: _distance(pattern, name), default="")
            raise PlanError(
                f"tensor_parallel_plan names {pattern!r} and {type(module).__name__} has no such module; accepted are"
                f" names of its modules, such as {near!r}, with * for any part between dots."
            )


def apply_styles(
    module: nn.Module, styles: Mapping[str, ParallelStyle], mesh: DeviceMesh, device: torch.device
) -> None:
    """Shard `module` over the one-dimensional `mesh` by `styles`; a collective of all ranks.

    Ranks get shards of rank 0's values; tied parameters stay tied.

    Raises:
        PlanError: a style does not fit its module.
    """
    compat.differentiate_placing_twice()
    module.to(device)
    equal_weights(itertools.chain(module.parameters(), module.buffers()))
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in compat.own_tensors(part)[0].items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, name))
    for pattern, style in styles.items():
        try:
            parallelize_module(module, mesh, {pattern: style}, src_data_rank=None)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise PlanError(
                f"tensor_parallel_plan has {type(style).__name__} for {pattern!r}, which does not take it ({error});"
                " give a style that fits the module, or leave it out."
            ) from error
    # torch makes a new parameter for each place, which unties tied ones.
    for tied in places.values():
        owner, name = next((place for place in tied if _is_divided(*place)), tied[0])
        for part, other in tied:
            compat.own_tensors(part)[0][other] = compat.own_tensors(owner)[0][name]


def _is_divided(part: nn.Module, name: str) -> bool:
    return hasattr(compat.own_tensors(part)[0][name], "placements")


def _matches(pattern: str, name: str) -> bool:
    wanted, found = pattern.split("."), name.split(".")
    return len(wanted) == len(found) and all(map(fnmatch.fnmatchcase, found, wanted))


def _distance(pattern: str, name: str) -> float:
    return -difflib.SequenceMatcher(None, pattern, name).ratio()
