"""Trial steps of a copy of any optimizer on small sample tensors, to find out how it can step.

The optimizer, its parameters and their gradients stay unchanged, and so does the random state.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale.errors import PlanError
from lightning_largescale.optimizers.local_view import LocalView, bare_step, options_of, set_options

# From this number of elements on, 8-bit optimizers quantize their state.
LARGE = 4096
# Rows and columns, small enough for milliseconds: of a tensor that optimizers treat as small, and of one that they
# treat as large even when it is halved.
SMALL_SIDES, LARGE_SIDES = (16, 8), (256, 128)
_STEPS = 3
# Used in place of the user's, which may be zero at first, or so small that rounding hides the change.
_LEARNING_RATE = 1e-2
# Relative to the change by the steps: rounding, even Muon's in bfloat16, is below it; mixing of elements is far above.
_TOLERANCE = 1e-2


class UntriedError(PlanError):
    """A copy of an optimizer did not step on small tensors, or changed nothing there."""


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether hooks that run between setup and the first step may change how `optimizer` steps.

    Some optimizers raise, or do nothing, until `train()` is called (schedule-free ones) or an attribute is set; those
    of torch do not.
    """
    return not type(optimizer).__module__.startswith("torch.optim.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A small tensor that stands for parameters of one kind.

    Attributes:
        group: index of its group.
        like: one of the parameters.
        start: its initial values.
        noise: for each step, the part of its gradient that does not depend on its values.
        state: the state of `like` from before the first step.
        sparse: whether its gradient is sparse, with the rows in which the noise is not zero.
    """

    group: int = 0
    like: Tensor
    start: Tensor
    noise: Sequence[Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)
    sparse: bool = False


@dataclass(frozen=True, kw_only=True)
class SteppedSamples:
    """The values and the state of the slices of each sample after the steps.

    Attributes:
        values: the values.
        states: the state.
        evaluates_again: whether a step evaluated the loss again, or at other values than it began with.
    """

    values: list[list[Tensor]]
    states: list[list[dict[str, Any]]]
    evaluates_again: bool


_Closure = Callable[[], Tensor]
# Returns the slices of a sample, given a tensor of its shape.
Split = Callable[[Sample, Tensor], Sequence[Tensor]]


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Context for a trial: the random state is restored at its end, and warnings are ignored."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def draw(shape: Sequence[int], like: Tensor, *, seed: int, device: torch.device | None = None) -> list[Tensor]:
    """Return initial values of a sample, and noise for each step, of the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different magnitudes; otherwise their means would be alike in all shards.
    scale = torch.logspace(-2, 1, shape[0] if shape else 1).view(-1, *[1] * (len(shape) - 1))
    made = [torch.randn(tuple(shape), generator=generator) * one for one in (scale, *[scale.flip(0)] * _STEPS)]
    return [one.view(tuple(shape)).to(device or like.device, like.dtype) for one in made]


def step_samples(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    split: Split,
    step: Callable[[Optimizer, _Closure], None],
) -> SteppedSamples:
    """Let a copy of `optimizer` step on slices of samples.

    Args:
        optimizer: the optimizer.
        groups: groups of the optimizer, whose options the copy gets.
        samples: samples of parameters of these groups.
        split: function that returns the slices of a sample.
        step: function that steps the copy, and evaluates a closure that sets the gradients.
    """
    parts = [[nn.Parameter(one) for one in split(sample, sample.start.clone())] for sample in samples]
    param_groups: list[dict[str, Any]] = [{**_options(group), "params": []} for group in groups]
    for sample, own in zip(samples, parts, strict=True):
        param_groups[sample.group]["params"] += own
    clone = clone_of(optimizer, param_groups)
    for sample, own in zip(samples, parts, strict=True):
        for part in own if sample.state else ():
            clone.state[part] = {key: _small(value, sample.like, part) for key, value in sample.state.items()}
    evaluated: list[bool] = []
    for number in range(_STEPS):
        before = [(part, part.detach().clone()) for own in parts for part in own]

        def closure(number: int = number, before: Sequence[tuple[Tensor, Tensor]] = before) -> Tensor:
            evaluated.append(all(isinstance(old, DTensor) or torch.equal(old, part) for part, old in before))
            for sample, own in zip(samples, parts, strict=True):
                for part, noise in zip(own, split(sample, sample.noise[number]), strict=True):
                    # The gradient depends on the parameter, so the result shows where it was evaluated.
                    gradient = noise + 0.1 * part.detach()
                    part.grad = _sparse(gradient, noise) if sample.sparse else gradient
            return torch.ones((), requires_grad=True)

        step(clone, closure)
    return SteppedSamples(
        values=[[part.detach() for part in own] for own in parts],
        states=[[dict(clone.state.get(part, {})) for part in own] for own in parts],
        evaluates_again=len(evaluated) > _STEPS or not all(evaluated),
    )


def step_with_closure(optimizer: Optimizer, closure: _Closure) -> None:
    """Step as training does: the closure is evaluated within the step."""
    bare_step(optimizer)(closure=closure)


def step_without_closure(optimizer: Optimizer, closure: _Closure) -> None:
    """Step after the closure, which the step does not receive."""
    closure()
    bare_step(optimizer)()


def step_in_view(optimizer: Optimizer, closure: _Closure) -> None:
    """Step as on local shards: after the closure, on new tensors in place of the parameters."""
    loss = closure()
    view = LocalView(optimizer)
    view.hold_all(_alias)
    bare_step(optimizer)(closure=lambda: loss)
    view.end()


def step_one_by_one(optimizer: Optimizer, closure: _Closure) -> None:
    """Step as on pages: after the closure, on one parameter after the other, with the groups' options from before."""
    closure()
    options = [options_of(group) for group in optimizer.param_groups]
    for number, parameters in enumerate([group["params"] for group in optimizer.param_groups]):
        for parameter in parameters:
            for group, own in zip(optimizer.param_groups, options, strict=True):
                set_options(group, own)
            view = LocalView(optimizer)
            # A new tensor, so the optimizer does not find data that it keeps by parameter outside of its state.
            view.hold_as(number, parameter, _alias)
            bare_step(optimizer)()
            view.end()


def whole(sample: Sample, tensor: Tensor) -> Sequence[Tensor]:
    """Return the full tensor as the only slice of a sample."""
    return [tensor]


def same(sample: Sample, expected: Tensor, found: Tensor) -> bool:
    """Return whether two ways to step made the same change to a sample, up to rounding."""
    return bool((found - expected).norm() <= _TOLERANCE * (expected - sample.start).norm())


def clone_of(optimizer: Optimizer, param_groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimizer that steps as `optimizer` does, over other parameters, without its state and hooks.

    Its other attributes are shared, except for lists of parameters and optimizers that it wraps.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    defaults = dict(optimizer.defaults)
    clone = copy.copy(optimizer)
    # Copying adds a default to the dict that the two share, which groups that are added later would get.
    clone.defaults, optimizer.defaults = optimizer.defaults, defaults
    clone.state, clone.param_groups = defaultdict(dict), param_groups
    for name, value in vars(optimizer).items():
        # A scheduler wraps the method of the object that it was given.
        if name == "step" or name in vars(clone):
            continue
        if isinstance(value, Optimizer):
            value = clone_of(value, param_groups)
        elif isinstance(value, list) and any(id(item) in own for item in value):
            value = [parameter for group in param_groups for parameter in group["params"]]
        setattr(clone, name, value)
    return clone


def in_words(error: Exception) -> str:
    """Return the class of an error and the first sentence of its message."""
    first = (str(error).splitlines() or [""])[0].split(". ")[0]
    return f"{type(error).__name__}: {first.removesuffix('.')}"


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    options = options_of(group)
    if (rate := options.get("lr")) is not None:
        options["lr"] = torch.full_like(rate, _LEARNING_RATE) if isinstance(rate, Tensor) else _LEARNING_RATE
    return options


def _small(value: Any, like: Tensor, part: Tensor) -> Any:
    """Return state from before the first step in the shape of `part`."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(part, requires_grad=False) if value.shape == like.shape else value.clone()


def _sparse(gradient: Tensor, noise: Tensor) -> Tensor:
    """Return the rows of `gradient` in which `noise` is not zero, as a sparse tensor."""
    rows = noise.any(1).nonzero()
    values = gradient[rows.squeeze(1)]
    return torch.sparse_coo_tensor(rows.t(), values, gradient.shape, check_invariants=False, is_coalesced=True)


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)
