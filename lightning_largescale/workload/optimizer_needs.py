"""Measure an optimizer's state for each parameter, and the temporaries of its `step()`, by running it.

The optimizer steps twice over fake tensors of the true shapes. An optimizer that needs data steps over small real
parameters instead, and the bytes are fitted to the shapes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.optimizers.state_spec import state_specs
from lightning_largescale.optimizers.trial import clone_of
from lightning_largescale.workload.steps import in_words
from lightning_largescale.workload.tracker import Tracker
from lightning_largescale.workload.workload import OptimizerNeeds

# The step count that an optimizer reads off fakes: past warm-up, where branches on it (RAdam's) take their usual side.
_STEP_READ = 1000.0
# Small real parameters: up to this number of elements they have the true shape, above it sides of `_SIDES`.
_SMALL = 2**16
_SIDES = (128, 256, 512)


class _MeasuredNeeds(NamedTuple):
    """The measured needs of an optimizer, in bytes.

    Attributes:
        state: the state of each parameter.
        unpaged: the part of `state` in tensors that do not have the parameter's shape.
        alone: the peak of the temporaries with the largest parameter alone.
        peak: the peak of the temporaries with all parameters.
        moved: bytes that one step reads and writes.
    """

    state: list[int]
    unpaged: list[int]
    alone: int = 0
    peak: int = 0
    moved: int = 0


def assumed_needs(class_name: str, sizes: Mapping[str, int]) -> OptimizerNeeds:
    """Assume Adam's needs for an optimizer that cannot be measured: two states and two temporaries a parameter."""
    return OptimizerNeeds(
        class_name=class_name,
        state_bytes={name: 2 * size for name, size in sizes.items()},
        step_temporary_largest=2.0,
        moved_bytes=10 * sum(sizes.values()),
    )


def optimizer_needs(
    optimizer: Optimizer,
    names: Mapping[int, str],
    used: Iterable[str],
    sizes: Mapping[str, int],
    *,
    mode: Any,
    device_type: str,
    notes: list[str],
) -> OptimizerNeeds:
    """Return the needs of `optimizer`, which is built over fake tensors.

    Args:
        optimizer: the optimizer; its parameters are fakes. Their gradients and its state are replaced.
        names: names of the module's parameters, by id.
        used: names of the parameters that receive a gradient.
        sizes: bytes of the module's trainable parameters, by name.
        mode: the mode that the fakes were made in.
        device_type: "cuda" selects the multi-tensor implementation where that is the default on CUDA.
        notes: receives a sentence where the result is not exact.
    """
    received = set(used)
    alike: dict[Any, dict[str, torch.Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            if name in received:
                alike.setdefault((index, parameter.shape, parameter.dtype), {})[name] = parameter
    # One parameter of each shape is measured and represents those like it.
    asked = [next(iter(members.values())) for members in alike.values()]
    numbers = [index for index, *_ in alike]
    if device_type == "cuda":
        _prefer_foreach(optimizer)
    kind = type(optimizer).__name__
    try:
        with mode:
            found = _asked(optimizer, asked, mode.from_tensor)
    except Exception as on_fakes:
        try:
            with compat.without_dispatch_modes():
                found = _fitted(optimizer, asked)
        except Exception as error:
            notes.append(f"{kind} could not be asked ({in_words(error)}), so two states a parameter are assumed")
            return assumed_needs(kind, {name: sizes[name] for members in alike.values() for name in members})
        notes.append(f"{kind} cannot step on fake tensors ({in_words(on_fakes)}); small parameters were asked instead")
    by_largest = found.peak <= 1.05 * found.alone
    whole = sum(_bytes(p) for members in alike.values() for p in members.values())
    share = whole / (sum(map(_bytes, asked)) or 1)
    return OptimizerNeeds(
        class_name=kind,
        state_bytes={name: size for members, size in zip(alike.values(), found.state, strict=True) for name in members},
        step_temporary_largest=found.peak / max(sizes.values(), default=1) if by_largest else 0.0,
        step_temporary_total=0.0 if by_largest else found.peak * share / (sum(sizes.values()) or 1),
        moved_bytes=round(found.moved * share),
        unpaged_bytes={
            name: size for members, size in zip(alike.values(), found.unpaged, strict=True) if size for name in members
        },
        divisible=_is_divisible(optimizer, [*zip(asked, numbers, strict=True)]),
    )


def _is_divisible(optimizer: Optimizer, parameters: Sequence[tuple[torch.Tensor, int]]) -> bool:
    """Return whether pages of the optimizer's state may end within a parameter.

    False for an optimizer that cannot step on small CPU tensors, such as one with kernels for a device only: a page may
    then hold full parameters only.
    """
    try:
        with compat.without_dispatch_modes():
            specs = state_specs(optimizer, parameters, torch.device("cpu")) if parameters else {}
    except Exception:
        return False
    return all(spec.elementwise for spec in specs.values())


def _asked(
    optimizer: Optimizer,
    parameters: Sequence[torch.Tensor],
    to_fake: Callable[[torch.Tensor], torch.Tensor] | None,
) -> _MeasuredNeeds:
    if not parameters:
        return _MeasuredNeeds([], [])
    largest = max(parameters, key=_bytes)
    _set_gradients(optimizer, parameters, [largest])
    alone, _ = _second_step(optimizer, to_fake)
    _set_gradients(optimizer, parameters, parameters)
    peak, moved = _second_step(optimizer, to_fake)
    state, unpaged = zip(*(_state_bytes(optimizer.state.get(p, {}), p.shape) for p in parameters), strict=True)
    return _MeasuredNeeds([*state], [*unpaged], alone, peak, moved)


def _second_step(optimizer: Optimizer, to_fake: Callable[[torch.Tensor], torch.Tensor] | None) -> tuple[int, int]:
    """Return the peak of the temporaries and the bytes moved in a `step()` whose state already exists."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    arguments = [lambda: 1.0] if closure is not None and closure.default is inspect.Parameter.empty else []
    for _ in range(2):
        tracker = Tracker(to_fake=to_fake, value=_STEP_READ)
        with tracker:
            optimizer.step(*arguments)
    return tracker.peak, tracker.moved


def _fitted(optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> _MeasuredNeeds:
    """Measure as `_asked` does, but with copies of the optimizer over small real parameters."""
    if not parameters:
        return _MeasuredNeeds([], [])
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    known: dict[tuple[int, torch.dtype, tuple[int, ...]], list[int]] = {}

    def ask(like: torch.Tensor, *shapes: tuple[int, ...]) -> list[int]:
        group = options[id(like)]
        key = (id(group), like.dtype, *shapes)
        if key not in known:
            small = [torch.zeros(shape, dtype=like.dtype, requires_grad=True) for shape in shapes]
            known[key] = [*_small_step(optimizer, group, small)]  # type: ignore[index]
        return known[key]  # type: ignore[index]

    def fit(parameter: torch.Tensor, which: int) -> int:
        if parameter.numel() <= _SMALL:
            return ask(parameter, tuple(parameter.shape))[which]
        shapes = _shapes_like(parameter)
        return _predicted(parameter.shape, shapes, [ask(parameter, shape)[which] for shape in shapes])

    one = (_SIDES[0], _SIDES[0])
    *_, alone, moved = ask(parameters[0], one)
    *_, peak, _ = ask(parameters[0], *([one] * 8))
    scale = max(map(_bytes, parameters)) if peak <= 1.05 * alone else sum(map(_bytes, parameters)) / 8
    small = math.prod(one) * parameters[0].element_size()
    return _MeasuredNeeds(
        [fit(parameter, 0) for parameter in parameters],
        [fit(parameter, 1) for parameter in parameters],
        round(alone * max(map(_bytes, parameters)) / small),
        round(peak * scale / small),
        round(moved * sum(map(_bytes, parameters)) / small),
    )


def _small_step(
    optimizer: Optimizer, group: dict[str, Any], parameters: list[torch.Tensor]
) -> tuple[int, int, int, int]:
    """Measure a copy of `optimizer` over `parameters`.

    Returns:
        State bytes of the first parameter, the unpaged part of them, peak of the temporaries, and bytes moved.
    """
    clone = clone_of(optimizer, [{**group, "params": parameters}])
    _set_gradients(clone, parameters, parameters)
    peak, moved = _second_step(clone, None)
    return *_state_bytes(clone.state.get(parameters[0], {}), parameters[0].shape), peak, moved


def _shapes_like(parameter: torch.Tensor) -> list[tuple[int, ...]]:
    """Return small shapes, enough to tell whether state grows with the elements, the rows or the columns."""
    if parameter.dim() < 2:
        return [(side * side,) for side in _SIDES]
    return [(rows, columns) for rows in _SIDES for columns in _SIDES]


def _predicted(shape: Sequence[int], shapes: Sequence[tuple[int, ...]], state_bytes: Sequence[int]) -> int:
    """Predict the bytes at `shape` by least squares over `bytes = a + b * numel + c * rows + d * columns`."""
    table = torch.tensor([_features(one) for one in shapes], dtype=torch.float64)
    measured = torch.tensor(state_bytes, dtype=torch.float64).unsqueeze(1)
    weights = torch.linalg.lstsq(table, measured, driver="gelsd").solution.squeeze(1)
    return max(0, round(float(torch.tensor(_features(shape), dtype=torch.float64) @ weights)))


def _features(shape: Sequence[int]) -> list[float]:
    numel = math.prod(shape)
    if len(shape) < 2:
        return [1.0, float(numel)]
    return [1.0, float(numel), numel / shape[-1], numel / shape[-2]]


def _set_gradients(
    optimizer: Optimizer, parameters: Iterable[torch.Tensor], with_gradient: Iterable[torch.Tensor]
) -> None:
    for parameter in parameters:
        parameter.grad = None
    for parameter in with_gradient:
        gradient = torch.ones_like(parameter)
        # SparseAdam accepts sparse gradients only; its state is dense, and a fake has no row indices.
        parameter.grad = _no_rows(gradient) if isinstance(optimizer, torch.optim.SparseAdam) else gradient


def _no_rows(gradient: torch.Tensor) -> torch.Tensor:
    place = torch.zeros(1, 0, dtype=torch.long, device=gradient.device)
    return torch.sparse_coo_tensor(place, gradient[:0], gradient.shape, check_invariants=False)


def _prefer_foreach(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.Adafactor):
        # Its default is one parameter after the other.
        return
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused") and not group.get("differentiable"):
            group["foreach"] = True


def _state_bytes(state: Mapping[str, Any], shape: Sequence[int]) -> tuple[int, int]:
    """Return the state bytes of a parameter of `shape`, and the part of them that is not paged."""
    tensors = [leaf for leaf in compat.leaves(state) if isinstance(leaf, torch.Tensor)]
    paged = {id(one) for one in state.values() if isinstance(one, torch.Tensor) and one.shape == shape and one.dim()}
    return sum(map(_bytes, tensors)), sum(_bytes(one) for one in tensors if id(one) not in paged)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
