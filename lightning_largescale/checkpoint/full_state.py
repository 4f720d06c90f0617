"""Full tensors of sharded state, for the checkpoint file that stock Lightning writes.

The file has what stock Lightning writes for a plain run: `state_dict` with the module's own keys, optimizer state by
parameter index. Full tensors are assembled one at a time, and kept on rank 0 only.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale.parallel.chunks import is_divided
from lightning_largescale.parallel.order import full, order_of
from lightning_largescale.parallel.rows import full_rows, rows_of


def full_module_state(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Return `module.state_dict()` with full plain tensors on the CPU: a collective.

    Args:
        module: the sharded module.
        keep: whether this rank keeps the tensors.

    Returns:
        The state dict with the module's own keys, tied weights as one tensor; empty without `keep`.
    """
    aliases: dict[int, str] = {}
    first_names = {
        name: aliases.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    parameters = dict(module.named_parameters())
    found: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        first = first_names.get(name, name)
        found[name] = found[first] if first in found else _whole(value, parameters.get(first), keep=keep)
    return found if keep else {}


def full_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with full plain tensors on the CPU: a collective; empty without `keep`."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=True))
    # Sorted, so that all ranks go in the same order, whatever the order in which parameters got their state.
    found = {
        index: apply_to_collection(state["state"][index], Tensor, _whole, by_index.get(index), keep=keep)
        for index in sorted(state["state"])
    }
    return {**state, "state": found} if keep else {}


def whole_everywhere(value: Any, *, keep: bool) -> Any:
    """Return `value` with its sharded tensors, in containers too, as full plain CPU tensors, or None if not `keep`.

    This is a collective: the ranks' containers must have the sharded tensors in the same order. Containers that hold
    sharded tensors are copied; all else stays the same object.
    """
    if is_divided(value):
        return _whole(value, value, keep=keep)
    if not isinstance(value, dict | list | tuple):
        return value
    keys = list(value) if isinstance(value, dict) else range(len(value))
    changed = {key: new for key in keys if (new := whole_everywhere(value[key], keep=keep)) is not value[key]}
    if not changed:
        return value
    if isinstance(value, tuple):
        items = [changed.get(index, item) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    copied = copy.copy(value)
    for key, new in changed.items():
        copied[key] = new
    return copied


def _whole(value: Any, parameter: object, *, keep: bool) -> Any:
    """Return the full value of a parameter or of its state on the CPU, None if not `keep`; a collective if sharded."""
    if not isinstance(value, Tensor):
        return value
    whole: Tensor = value
    rows = rows_of(parameter)
    if isinstance(parameter, Tensor) and rows is not None:
        # The state of a table has the table's shape, or is the same on all ranks.
        return full_rows(value, rows, keep=keep) if value.shape == parameter.shape else whole.detach().cpu()
    if isinstance(value, DTensor):
        # An average may be kept in DRAM, which not every collective can read.
        on_device: Any = value.to(value.device_mesh.device_type)
        whole = full(on_device, order_of(parameter))
    return whole.detach().cpu() if keep else None
