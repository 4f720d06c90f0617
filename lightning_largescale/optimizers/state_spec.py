"""Detection of how an optimizer's state can be paged, by a trial on small tensors.

Most optimizers are elementwise; they are paged by elements. Some need a full matrix (Muon, Adafactor); they are paged
by parameters. Some need all parameters at once (a norm over all of them, a line search); they cannot be paged. Stepping
on one page after the other must give the same result as one step on all parameters, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale.errors import PlanError
from lightning_largescale.optimizers.trial import (
    LARGE,
    LARGE_SIDES,
    SMALL_SIDES,
    Sample,
    UntriedError,
    draw,
    in_words,
    step_one_by_one,
    step_samples,
    step_without_closure,
    undisturbed,
    whole,
)

# The elements at which a large and a small sample are split; pages may end at multiples of 4096 elements. Small
# parameters are not split into pages, but they are sharded among ranks.
_CUTS, _SMALL_CUTS = (LARGE, 3 * LARGE), (64,)

# The group's number, the number of dimensions (at most 2), whether the shard is large, and the dtype.
SpecKey = tuple[int, int, bool, torch.dtype]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """The kind of optimizer state of some parameters.

    Attributes:
        elementwise: Whether a step on a slice of a parameter gives the same result for it as a step on the full
            parameter.
        dtypes: The dtype of each state tensor that has the parameter's shape, by key. Other state is not paged.
    """

    elementwise: bool
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def bytes_per_element(self) -> int:
        """The bytes of paged state per element."""
        return sum(dtype.itemsize for dtype in self.dtypes.values())


def spec_key(parameter: Tensor, group: int) -> SpecKey:
    """Return the key that groups parameters whose state is of the same kind."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return group, min(local.dim(), 2), local.numel() >= LARGE, local.dtype


def state_specs(
    optimizer: Optimizer, parameters: Sequence[tuple[Tensor, int]], device: torch.device | None = None
) -> Mapping[SpecKey, StateSpec]:
    """Find out how the state of `parameters` can be paged.

    Args:
        optimizer: The optimizer, of any class.
        parameters: Parameters of the optimizer, each with the number of its group.
        device: The device that steps on them; None for the device they are on.

    Returns:
        The kind of the state of each parameter, by `spec_key`.

    Raises:
        UntriedError: The optimizer, in its current state, does not step on small tensors.
        PlanError: The optimizer cannot be paged: its `step` requires a closure, stepping on one parameter after the
            other gives another result than one step on all, or it needs a full parameter that is sharded.
    """
    keys = {spec_key(parameter, group): parameter for parameter, group in parameters}
    device = parameters[0][0].device if device is None else device
    with undisturbed(device):
        samples = {key: _sample(key, like, seed, device) for seed, (key, like) in enumerate(keys.items())}
        specs = _tried(optimizer, samples)
    for key, parameter in keys.items():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        if mesh is not None and mesh.size() > 1 and not specs[key].elementwise:
            raise PlanError(
                f"{type(optimizer).__name__} needs a parameter as a whole, of which ranks have parts, so its state"
                " cannot be paged; leave out offload_optimizer and release_gradients, or give dp_shard=1."
            )
    return specs


def _tried(optimizer: Optimizer, by_key: Mapping[SpecKey, Sample]) -> Mapping[SpecKey, StateSpec]:
    name, groups, samples = type(optimizer).__name__, optimizer.param_groups, [*by_key.values()]
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlanError(
            f"{name} cannot be paged: it evaluates the loss within its step, and forward and backward run once a step;"
            " leave out offload_optimizer, offload_parameters and release_gradients, or choose another optimizer."
        )
    try:
        full = step_samples(optimizer, groups, samples, whole, step_without_closure)
    except Exception as error:
        raise UntriedError(
            f"{name} cannot be paged: small tensors to try it on are not accepted ({in_words(error)}); leave out"
            " offload_optimizer, offload_parameters and release_gradients."
        ) from error
    dtypes = [_paged_keys(state, value) for (state,), (value,) in zip(full.states, full.values, strict=True)]
    why, failure = "", None
    for elementwise in (True, False):
        try:
            found = step_samples(optimizer, groups, samples, _cut if elementwise else whole, step_one_by_one)
        except Exception as error:
            # Any exception on slices shows that the optimizer needs full parameters.
            why, failure = f"fails ({in_words(error)})", error
            continue
        alike = (
            _equal(_joined(parts), value.reshape(-1)) and _same_state(states, state, parts, paged)
            for parts, states, (value,), (state,), paged in zip(
                found.values, found.states, full.values, full.states, dtypes, strict=True
            )
        )
        if all(alike):
            return {key: StateSpec(elementwise, paged) for key, paged in zip(by_key, dtypes, strict=True)}
        why, failure = "is not that on all of them", None
    raise PlanError(
        f"{name} cannot be paged: its step on one parameter after the other {why}; leave out offload_optimizer,"
        " offload_parameters and release_gradients, or choose another optimizer."
    ) from failure


def _sample(key: SpecKey, like: Tensor, seed: int, device: torch.device) -> Sample:
    group, dims, large, _ = key
    rows, columns = LARGE_SIDES if large else SMALL_SIDES
    start, *noise = draw([(), (rows * columns,), (rows, columns)][dims], like, seed=seed, device=device)
    return Sample(group=group, like=like, start=start, noise=noise)


def _cut(sample: Sample, tensor: Tensor) -> Sequence[Tensor]:
    if not tensor.dim():
        return [tensor]
    return tensor.view(-1).tensor_split(_CUTS if tensor.numel() >= LARGE else _SMALL_CUTS)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _paged_keys(state: Mapping[str, Any], value: Tensor) -> dict[str, torch.dtype]:
    return {key: one.dtype for key, one in state.items() if _has_shape(one, value) and one.dim()}


def _has_shape(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape


def _same_state(
    parts: list[dict[str, Any]], full: dict[str, Any], values: list[Tensor], paged: Mapping[str, torch.dtype]
) -> bool:
    """Return whether the state of the slices equals that of the full parameter.

    Paged state must be equal slice by slice; other state must be the same for each slice.
    """
    for key, expected in full.items():
        found: list[Any] = [part.get(key) for part in parts]
        if key in paged:
            alike = all(map(_has_shape, found, values)) and _equal(_joined(found), expected.reshape(-1))
        else:
            alike = all(_equal(one, expected) for one in found)
        if not alike:
            return False
    return True


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    try:
        return bool(one == other) or (one != one and other != other)
    except (RuntimeError, ValueError, TypeError):
        # Values that cannot be compared count as different.
        return False
