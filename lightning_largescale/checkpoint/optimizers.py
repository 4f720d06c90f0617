"""Optimizer state by parameter names, and its loading into any optimizer of the same class.

Names mean the same in every process, whatever the order of the parameters; torch's own indices do not.

Source: torch.distributed.checkpoint.state_dict, whose form this is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale.checkpoint.directory import EXTRA, OPTIMIZERS
from lightning_largescale.checkpoint.files import listed
from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import let_rest
from lightning_largescale.parallel.chunks import empty_part, write_part
from lightning_largescale.parallel.copies import divided_like
from lightning_largescale.parallel.order import as_ordered, order_of
from lightning_largescale.parallel.rows import global_shape, mark_rows, rows_of
from lightning_largescale.parallel.stored import Stored

_Names = dict[Tensor, str]
# Where to load this rank's shard of a state tensor: memory that exists, a device for new memory there, or None for new
# memory on the parameter's device. `StateMemory` returns it for a parameter and a key of its state.
_Place = Tensor | torch.device | None
StateMemory = Callable[[Tensor, str], _Place]


def named_optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with `module`'s parameter names for indices; sharded tensors stay sharded."""
    names = _names(module)
    state = optimizer.state_dict()
    parameters = dict(_by_index(optimizer, state["param_groups"]))
    values = {
        names[parameters[index]]: apply_to_collection(state["state"][index], Tensor, _told, parameters[index])
        # Sorted, so that all ranks go in the same order, whatever the order in which parameters got their state.
        for index in sorted(state["state"])
    }
    groups = [
        {**group, "params": [names[parameters[index]] for index in group["params"]]} for group in state["param_groups"]
    ]
    return {**state, "state": values, "param_groups": groups}


def kinds_of(optimizer: Optimizer) -> list[str]:
    """Return the class names of `optimizer`, its own class first, which identify it in a checkpoint."""
    inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return [kind.__name__ for kind in type(inner).__mro__ if issubclass(kind, Optimizer) and kind is not Optimizer]


def saved_kinds(checkpoint: Mapping[str, Any]) -> list[list[str]] | None:
    """Return `kinds_of` of each optimizer saved in `checkpoint`; None if it does not record them."""
    kinds: list[list[str]] | None = checkpoint.get(EXTRA, {}).get(OPTIMIZERS)
    return kinds


def load_optimizer_state(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    module: nn.Module,
    *,
    kinds: Sequence[str] = (),
    memory_of: StateMemory = lambda parameter, key: None,
) -> None:
    """Load full optimizer state into `optimizer`; each rank takes its shard without communication.

    Args:
        optimizer: an optimizer of parameters of `module`, sharded or not.
        state: the state dict, by parameter indices or by parameter names in `module`.
        module: the module, sharded, replicated or plain.
        kinds: `kinds_of` the saved optimizer, if known.
        memory_of: returns where to load a state tensor.

    Raises:
        PlanError: the state is of an optimizer of another class, or with other groups.
    """
    if kinds and not {*kinds} & {*kinds_of(optimizer)}:
        raise PlanError(
            f"the checkpoint's optimizer is {kinds[0]} and this is {kinds_of(optimizer)[0]}; make one of the same class"
            " in configure_optimizers, or load the weights alone."
        )
    _check_groups(optimizer, state["param_groups"])
    if any(isinstance(key, str) for group in state["param_groups"] for key in group["params"]):
        state = _indexed(optimizer, state, module)
    parameters = dict(_by_index(optimizer, state["param_groups"]))
    divided = {index: _divided(values, parameters.get(index), memory_of) for index, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": divided})


def indexed_optimizer_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return `state` with torch's indices for parameter names: positions in the concatenated parameter groups."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    indices = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [indices[name] for name in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {indices[name]: one for name, one in state["state"].items()}, "param_groups": groups}


def _names(module: nn.Module) -> _Names:
    return {parameter: name for name, parameter in module.named_parameters()}


def _by_index(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Tensor]]:
    """Return (index in `groups`, parameter of `optimizer`) pairs."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [*zip((index for group in groups for index in group["params"]), parameters, strict=False)]


def _indexed(optimizer: Optimizer, state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return state by names as state by the indices of the optimizer's own parameters.

    Raises:
        PlanError: a group of the state lacks parameters of the optimizer's group.
    """
    names = _names(module)
    groups: list[dict[str, Any]] = []
    values: dict[int, Any] = {}
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        own = [names[parameter] for parameter in group["params"]]
        if missing := [name for name in own if name not in saved["params"]]:
            raise PlanError(
                f"the checkpoint's {type(optimizer).__name__} does not have {listed(missing)} in its parameter group"
                f" {number}; make the optimizer with the same groups in configure_optimizers."
            )
        first = sum(len(group["params"]) for group in groups)
        values |= {first + place: state["state"][name] for place, name in enumerate(own) if name in state["state"]}
        groups.append({**saved, "params": [*range(first, first + len(own))]})
    return {**state, "state": values, "param_groups": groups}


def _check_groups(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    kind, own = type(optimizer).__name__, optimizer.param_groups
    sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if sizes[0] != sizes[1]:
        raise PlanError(
            f"the checkpoint has parameter groups of {sizes[0]} parameters and this {kind} of {sizes[1]};"
            " make the optimizer with the same groups in configure_optimizers, or load the weights alone."
        )
    for theirs, ours in zip(saved, own, strict=True):
        # Another version of torch may add or lack options; another optimizer class lacks some and has others.
        lacking, beside = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        # Schedulers add the initial values of the options that they change.
        beside = [name for name in beside if not name.startswith(("initial_", "max_", "min_", "base_"))]
        if lacking and beside:
            raise PlanError(
                f"the checkpoint's optimizer has {listed(beside)} and no {listed(lacking)}, so it is no {kind};"
                " make one of the same class in configure_optimizers, or load the weights alone."
            )


def _told(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a state tensor, marked with its parameter's table rows or element order if it is sharded."""
    rows = rows_of(parameter)
    if rows is not None and value.shape == parameter.shape:
        # Checkpoint files hold no sparse tensors.
        return mark_rows(value.detach().to_dense() if value.is_sparse else value.detach(), rows)
    return as_ordered(value.detach(), order_of(parameter)) if isinstance(value, DTensor) else value


def _divided(values: Any, parameter: Tensor | None, memory_of: StateMemory) -> Any:
    """Return this rank's shard of the state of `parameter`."""
    if not isinstance(values, Mapping) or parameter is None:
        return apply_to_collection(values, Tensor, _own, parameter)
    return {
        key: _own(value, parameter, memory_of(parameter, key))
        if isinstance(value, Tensor)
        else apply_to_collection(value, Tensor, _own, parameter)
        for key, value in values.items()
    }


def _own(value: Tensor, parameter: Tensor | None, place: _Place = None) -> Any:
    """Return this rank's shard of a state tensor of `parameter`, in `place` if given."""
    if parameter is None or value.shape != global_shape(parameter):
        return value.whole() if isinstance(value, Stored) else value
    if place is not None and not isinstance(value, DTensor):
        return _placed(value, parameter, place)
    if not isinstance(value, Stored):
        return divided_like(value, parameter)
    own = empty_part(parameter, dtype=value.dtype)
    value.read(own)
    return own


def _placed(value: Tensor, parameter: Tensor, place: Tensor | torch.device) -> Tensor:
    """Return this rank's shard of a state tensor in `place`, without using memory of the parameter's device."""
    memory, device = (place, place.device) if isinstance(place, Tensor) else (None, place)
    alike = memory is not None and memory.dtype == value.dtype
    own = empty_part(parameter, dtype=value.dtype, device=device, own=memory if alike else None)
    if isinstance(value, Stored):
        value.read(own)
    else:
        write_part(own, value)
    if memory is None:
        return own
    if not alike:
        memory.copy_(local_of(own))
        own = empty_part(parameter, own=memory)
    let_rest(memory)
    return own
