"""Checkpoints that do not know the plan: full tensors out, and in again under any plan.

What is written is what stock Lightning writes for a plain run: `state_dict` with the module's own keys, optimizer state
by parameter index. Full tensors are assembled one at a time, and kept on rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def full_module_state(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """`module.state_dict()` with full plain tensors on the CPU: a collective.

    Args:
        module: sharded.
        keep: whether this rank wants them.

    Returns:
        Keys as the module has them, tied weights as one tensor; empty without `keep`.
    """
    aliases: dict[int, str] = {}
    first_names = {
        name: aliases.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    full: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        first = first_names.get(name, name)
        whole = full[first] if first in full else _whole(value, keep=keep)
        full[name] = whole
    return full if keep else {}


def load_module_state(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """`module.load_state_dict` of full tensors, each rank taking its slices without communication.

    Raises:
        RuntimeError: keys or shapes do not match, as torch says it.
    """
    targets = module.state_dict()
    module.load_state_dict({name: _like(value, targets.get(name)) for name, value in state.items()}, strict=strict)


def full_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` with full plain tensors on the CPU: a collective; empty without `keep`."""
    state = optimizer.state_dict()
    # In the same order on all ranks, whatever the order in which parameters got their state.
    full = {
        index: apply_to_collection(state["state"][index], Tensor, _whole, keep=keep) for index in sorted(state["state"])
    }
    return {**state, "state": full} if keep else {}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of full tensors, each rank taking its slices without communication."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=False))

    divided = {
        index: apply_to_collection(values, Tensor, _like, by_index.get(index))
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": divided})


def _whole(value: Any, *, keep: bool) -> Any:
    """The full value on the CPU where it is wanted; a collective for a DTensor, which all ranks enter."""
    if not isinstance(value, Tensor):
        return value
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().cpu() if keep else None


def _like(value: Any, target: Any) -> Any:
    """`value` divided as `target` is, where both are the same tensor but for that."""
    if not isinstance(target, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != target.shape:
        return value
    local = value.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
