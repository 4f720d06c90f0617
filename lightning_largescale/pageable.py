"""Detection of how an optimizer can be paged, by stepping it on small sample tensors.

Most optimizers are elementwise; they are paged by elements. Some need a full matrix (Muon, Adafactor); they are paged
by parameters. Some need all parameters at once (a norm over all of them, a line search); they cannot be paged. Stepping
on one page after the other must give the same result as one step on all parameters, bit for bit.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale.errors import PlanError
from lightning_largescale.optimizing import UntriedError, bare_step, clone_of, hold, in_words

_STEPS = 3
# From this number of elements on, 8-bit optimizers quantize their state, and pages may end in the middle of a
# parameter.
_LARGE = 4096
# Used in place of the user's learning rate, which may be zero at first, or so small that rounding hides the change.
_LEARNING_RATE = 1e-2
# The elements at which a large and a small sample are split. Small parameters are not split into pages, but they are
# sharded among ranks.
_CUTS, _SMALL_CUTS = (_LARGE, 3 * _LARGE), (64,)

# The group's number, the number of dimensions (at most 2), whether the shard is large, and the dtype.
Key = tuple[int, int, bool, torch.dtype]
_Values = list[list[Tensor]]
_States = list[list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of optimizer state of some parameters.

    Attributes:
        divisible: Whether a step on a slice of a parameter gives the same result for it as a step on the full
            parameter.
        dtypes: The dtype of each state tensor that has the parameter's shape, by key. Other state is not paged.
    """

    divisible: bool
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def bytes_per_element(self) -> int:
        """The bytes of paged state per element."""
        return sum(dtype.itemsize for dtype in self.dtypes.values())


def kind_key(parameter: Tensor, group: int) -> Key:
    """Return the key that groups parameters whose state is of the same kind."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return group, min(local.dim(), 2), local.numel() >= _LARGE, local.dtype


def ask_kinds(
    optimizer: Optimizer, parameters: Sequence[tuple[Tensor, int]], device: torch.device | None = None
) -> Mapping[Key, Kind]:
    """Find out how the state of `parameters` can be paged.

    The optimizer, its parameters and their gradients stay unchanged, and so does the random state.

    Args:
        optimizer: The optimizer, of any class.
        parameters: Parameters of the optimizer, each with the number of its group.
        device: The device that steps on them; None for the device they are on.

    Returns:
        The kind of the state of each parameter, by `kind_key`.

    Raises:
        UntriedError: The optimizer, in its current state, does not step on small tensors.
        PlanError: The optimizer cannot be paged: its `step` requires a closure, stepping on one parameter after the
            other gives another result than one step on all, or it needs a full parameter that is sharded.
    """
    keys = {kind_key(parameter, group): parameter for parameter, group in parameters}
    device = parameters[0][0].device if device is None else device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = _tried(optimizer, {key: _sample(key, number, device) for number, key in enumerate(keys)})
    for key, parameter in keys.items():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        if mesh is not None and mesh.size() > 1 and not kinds[key].divisible:
            raise PlanError(
                f"{type(optimizer).__name__} needs a parameter as a whole, of which ranks have parts, so its state"
                " cannot be paged; leave out offload_optimizer and release_gradients, or give dp_shard=1."
            )
    return kinds


def _tried(optimizer: Optimizer, samples: Mapping[Key, list[Tensor]]) -> Mapping[Key, Kind]:
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlanError(
            f"{name} cannot be paged: it evaluates the loss within its step, and forward and backward run once a step;"
            " leave out offload_optimizer, offload_parameters and release_gradients, or choose another optimizer."
        )
    try:
        whole, whole_states = _steps(optimizer, samples, lambda key: (), apart=False)
    except Exception as error:
        raise UntriedError(
            f"{name} cannot be paged: small tensors to try it on are not accepted ({in_words(error)}); leave out"
            " offload_optimizer, offload_parameters and release_gradients."
        ) from error
    dtypes = [_paged_keys(states, values) for states, values in zip(whole_states, whole, strict=True)]
    why, failure = "", None
    for divisible in (True, False):
        cuts = [_cuts(key) if divisible else () for key in samples]
        by_key = dict(zip(samples, cuts, strict=True))
        try:
            values, states = _steps(optimizer, samples, by_key.__getitem__, apart=True)
        except Exception as error:
            # Any exception on slices shows that the optimizer needs full parameters.
            why, failure = f"fails ({in_words(error)})", error
            continue
        alike = [
            torch.equal(torch.cat([part.reshape(-1) for part in parts]), one[0].reshape(-1))
            and _same_state(own, expected[0], parts, paged)
            for parts, own, one, expected, paged in zip(values, states, whole, whole_states, dtypes, strict=True)
        ]
        if all(alike):
            # Its traceback refers to this frame, and so would hold the samples on the device.
            failure = None
            kinds = [Kind(divisible, paged) for paged in dtypes]
            return dict(zip(samples, kinds, strict=True))
        why, failure = "is not that on all of them", None
    raise PlanError(
        f"{name} cannot be paged: its step on one parameter after the other {why}; leave out offload_optimizer,"
        " offload_parameters and release_gradients, or choose another optimizer."
    ) from failure


def _cuts(key: Key) -> Sequence[int]:
    _, dims, large, _ = key
    return (_CUTS if large else _SMALL_CUTS) if dims else ()


def _steps(
    optimizer: Optimizer, samples: Mapping[Key, list[Tensor]], cuts: Callable[[Key], Sequence[int]], *, apart: bool
) -> tuple[_Values, _States]:
    """Run some steps on slices of the samples, all together or, if `apart`, one after the other.

    Returns:
        The values and the state of the slices of each sample.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for options in groups:
        if options.get("lr") is not None:
            given = options["lr"]
            options["lr"] = torch.full_like(given, _LEARNING_RATE) if _is_tensor(given) else _LEARNING_RATE
    parts = {
        key: [nn.Parameter(part) for part in _parts(sample[0].clone(), cuts(key))] for key, sample in samples.items()
    }
    every = [(key[0], part) for key, own in parts.items() for part in own]
    clone = clone_of(optimizer, [{**options, "params": []} for options in groups])
    step = bare_step(clone)
    for number in range(1, _STEPS + 1):
        for key, own in parts.items():
            for part, gradient in zip(own, _parts(samples[key][number], cuts(key)), strict=True):
                part.grad = gradient.clone()
        values = [{key: value for key, value in group.items() if key != "params"} for group in clone.param_groups]
        for turn in [[one] for one in every] if apart else [every]:
            for index, group in enumerate(clone.param_groups):
                hold(group, values[index], [part for own, part in turn if own == index])
            with torch.no_grad(), _others(clone) if apart else contextlib.nullcontext():
                step()
    states = [[dict(clone.state.get(part, {})) for part in own] for own in parts.values()]
    return [[part.detach() for part in own] for own in parts.values()], states


@contextlib.contextmanager
def _others(optimizer: Optimizer) -> Iterator[None]:
    """Context in which `optimizer` holds other tensors, with the same values and state, in place of its parameters.

    So it does not find data that it keeps by parameter outside of its state, just as in a turn on a page.
    """
    held: list[tuple[Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        given, group["params"] = group["params"], [nn.Parameter(part.detach()) for part in group["params"]]
        held += zip(given, group["params"], strict=True)
    for part, other in held:
        other.grad = part.grad
        if part in optimizer.state:
            optimizer.state[other] = optimizer.state.pop(part)
    yield
    for part, other in held:
        if other.data_ptr() != part.data_ptr():
            part.copy_(other)
        if other in optimizer.state:
            optimizer.state[part] = optimizer.state.pop(other)


def _parts(tensor: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    return [*tensor.view(-1).tensor_split(list(cuts))] if cuts else [tensor]


def _paged_keys(states: list[dict[str, Any]], values: list[Tensor]) -> dict[str, torch.dtype]:
    (state,), (value,) = states, values
    return {key: one.dtype for key, one in state.items() if _is_tensor(one) and one.shape == value.shape and one.dim()}


def _same_state(
    parts: list[dict[str, Any]], whole: dict[str, Any], values: list[Tensor], paged: Mapping[str, torch.dtype]
) -> bool:
    """Return whether the state of the slices equals that of the full parameter.

    Paged state must be equal slice by slice; other state must be the same for each slice.
    """
    for key, expected in whole.items():
        found: list[Any] = [part.get(key) for part in parts]
        if key in paged:
            if not all(_is_tensor(one) and one.shape == value.shape for one, value in zip(found, values, strict=True)):
                return False
            if not torch.equal(torch.cat([one.reshape(-1) for one in found]), expected.reshape(-1)):
                return False
        elif not all(_equal(one, expected) for one in found):
            return False
    return True


def _equal(one: Any, other: Any) -> bool:
    if _is_tensor(one) and _is_tensor(other):
        return one.shape == other.shape and torch.equal(one, other)
    if _is_tensor(one) or _is_tensor(other):
        return False
    try:
        return bool(one == other) or (one != one and other != other)
    except (RuntimeError, ValueError, TypeError):
        # Values that cannot be compared count as different.
        return False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _sample(key: Key, seed: int, device: torch.device) -> list[Tensor]:
    """Return initial values and one gradient per step, with rows whose magnitudes differ by up to a factor of 1000."""
    _, dims, large, dtype = key
    rows, columns = (256, 128) if large else (16, 8)
    shape = {0: (), 1: (rows * columns,)}.get(dims, (rows, columns))
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, shape[0] if shape else 1).view(-1, *[1] * (len(shape) - 1))
    scale = scale.expand(shape) if shape else scale.view(())
    made = [torch.randn(shape, generator=generator) * scale for _ in range(_STEPS + 1)]
    return [one.to(device, dtype) for one in made]
