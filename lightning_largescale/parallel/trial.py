"""Find out how an optimizer can step on a sharded module, by a trial on small tensors.

Most optimizers are element-wise: a step on each rank's shard equals a step on the full parameter. Others mix elements
(factored moments, trust ratios, orthogonalization): they must be able to step on DTensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_largescale import comm
from lightning_largescale.optimizing import clone_of, closure_first, in_words
from lightning_largescale.parallel.exchange import Exchange
from lightning_largescale.parallel.order import divided, divided_dim, divided_dims, full

# Rows and columns, small enough for milliseconds: of a tensor that optimizers treat as small, and of one that they
# treat as large even when it is halved, as 8-bit optimizers do from 4096 elements on.
_SIDES = ((16, 8), (256, 128))
_STEPS = 3
# Relative to the change by the steps: rounding, even Muon's in bfloat16, is below it; mixing of elements is far above.
_TOLERANCE = 1e-2
# Used in place of the user's, which may be zero at first, or so small that rounding hides the change.
_LEARNING_RATE = 1e-2


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """How an optimizer can step on a sharded module.

    Attributes:
        local: whether it steps on the plain tensors of this rank's shards, else on the parameters themselves.
        refusal: why it can do neither; None if it can.
        untried: whether it was refused because a copy of it did not step at all.
        whole_keys: state that is equal for a shard and for the full parameter, such as a step count.
        block_sizes: by key, the number of elements per block of blockwise state, such as the scales of 8-bit codes; 0
            if unknown.
    """

    local: bool = False
    refusal: str | None = None
    untried: bool = False
    whole_keys: frozenset[str] = frozenset()
    block_sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A small tensor that stands for parameters of one kind in one group, with noise for its gradient in each step."""

    like: Tensor
    start: Tensor
    noise: list[Tensor]
    state: Mapping[str, Any]


_Groups = list[tuple[dict[str, Any], list[_Sample]]]
_Layout = Callable[[_Sample, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class _SteppedSamples:
    """The samples' values and state after the steps, and whether a step evaluated the loss again or at other values."""

    values: list[Tensor]
    states: list[dict[str, Any]]
    evaluates_again: bool


def ask(optimizer: Optimizer, initial: Mapping[Tensor, Mapping[str, Any]]) -> OptimizerTraits:
    """Return how `optimizer` can step if some of its parameters are DTensors; a collective, equal on all ranks.

    The optimizer, its parameters and their gradients are not changed.

    Args:
        optimizer: the optimizer, with the same groups on all ranks.
        initial: the state that parameters had before the first step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters) or _known_to_step(optimizer, parameters):
        return OptimizerTraits()
    device = parameters[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = _tried(optimizer, _samples(optimizer, initial))
    return _agreed(answer)


def count_shards(parameter: Tensor) -> int:
    """Return the number of shards of `parameter`."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(axis) for axis, one in enumerate(parameter.placements) if divided_dim(one) is not None)


def _agreed(answer: OptimizerTraits) -> OptimizerTraits:
    """Agree on one of the ranks' answers, which may differ by rounding; a collective."""
    answers = comm.all_gather_object(answer)
    for other in answers:
        if other.refusal is not None:
            return other
    if any(other != answers[0] for other in answers):
        return OptimizerTraits(refusal="ranks found different ways for it to step")
    return answers[0]


def _known_to_step(optimizer: Optimizer, parameters: list[Tensor]) -> bool:
    """Return whether the optimizer is known to step on DTensors, so that a trial is needless."""
    meshes = {parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in parameters}
    options = [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    if len(meshes) > 1 or any(isinstance(value, Tensor) for value in options):
        return False
    kind = type(optimizer)
    return kind in (Adam, AdamW) or (kind is SGD and not any(group["fused"] for group in optimizer.param_groups))


def _tried(optimizer: Optimizer, groups: _Groups) -> OptimizerTraits:
    samples = [sample for _, members in groups for sample in members]
    try:
        whole = _steps(optimizer, groups, lambda _, tensor: tensor)
    except Exception as error:
        return OptimizerTraits(refusal=f"small tensors to try it on are not accepted ({in_words(error)})", untried=True)
    if whole.evaluates_again:
        return OptimizerTraits(
            refusal="it evaluates the loss again within its step, and forward and backward run once a step"
        )
    if all(torch.equal(value, sample.start) for value, sample in zip(whole.values, samples, strict=True)):
        return OptimizerTraits(refusal="it changed nothing when it was tried on small tensors", untried=True)
    try:
        divided = _steps(optimizer, groups, _divide).values
        if _same(samples, whole.values, [_full(value) for value in divided]):
            return OptimizerTraits()
        failure = "its steps on DTensors are not those on whole parameters"
    except Exception as error:
        failure = f"it does not step on DTensors ({in_words(error)})"
    whole_keys: frozenset[str] = frozenset()
    block_sizes: dict[str, int] = {}
    for dim in sorted({dim for sample in samples for dim in divided_dims(sample.like)}):
        try:
            first, second = (_steps(optimizer, groups, partial(_half, dim, part), apart=True) for part in range(2))
        except Exception as error:
            return OptimizerTraits(refusal=f"{failure}, nor on parts of parameters ({in_words(error)})")
        if not _same(samples, whole.values, _joined(dim, samples, first.values, second.values)):
            return OptimizerTraits(refusal=f"{failure}, and its step on a parameter is not that on its parts")
        equal, blocks = _sorted_keys(samples, whole, first, second)
        whole_keys, block_sizes = whole_keys | equal, block_sizes | blocks
    return OptimizerTraits(local=True, whole_keys=whole_keys - block_sizes.keys(), block_sizes=block_sizes)


def _samples(optimizer: Optimizer, initial: Mapping[Tensor, Mapping[str, Any]]) -> _Groups:
    """Return groups of samples: one group per set of options, one sample per kind of parameter and size."""
    groups: dict[str, tuple[dict[str, Any], dict[Any, _Sample]]] = {}
    shards = max(count_shards(parameter) for group in optimizer.param_groups for parameter in group["params"])
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        key = repr({name: value for name, value in options.items() if name not in ("lr", "initial_lr")})
        if options.get("lr") is not None:
            options["lr"] = _LEARNING_RATE
        _, samples = groups.setdefault(key, (options, {}))
        for parameter in group["params"]:
            for sides in _SIDES if parameter.dim() else _SIDES[:1]:
                kind = (sides, parameter.dim(), parameter.dtype, isinstance(parameter, DTensor))
                if kind not in samples:
                    samples[kind] = _sample(parameter, sides, shards, len(samples), initial.get(parameter, {}))
    return [(options, list(samples.values())) for options, samples in groups.values()]


def _sample(like: Tensor, sides: tuple[int, int], shards: int, seed: int, state: Mapping[str, Any]) -> _Sample:
    # A number of rows that is divisible by the ranks, and by two.
    rows, columns = 2 * shards * math.ceil(sides[0] / (2 * shards)), sides[1]
    shape = {0: (), 1: (rows * columns,)}.get(like.dim(), (rows, columns, *[2] * (like.dim() - 2)))
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different magnitudes; otherwise their means would be alike in all shards.
    scale = torch.logspace(-2, 1, shape[0] if shape else 1).view(-1, *[1] * (len(shape) - 1)).expand(shape or 1)
    scales = [scale, *[scale.flip(0)] * _STEPS]
    start, *noise = (torch.randn(shape, generator=generator) * one.view(shape) for one in scales)
    start, *noise = (tensor.to(like.device, like.dtype) for tensor in (start, *noise))
    return _Sample(like=like, start=start, noise=noise, state=state)


def _steps(optimizer: Optimizer, groups: _Groups, layout: _Layout, *, apart: bool = False) -> _SteppedSamples:
    """Let a copy of `optimizer` step on the samples in the given `layout`.

    With `apart` it steps as on the shards of a sharded module: after the closure, on new tensors in every step.
    """
    parameters: dict[Tensor, _Sample] = {}
    param_groups = []
    for options, samples in groups:
        members: dict[Tensor, _Sample] = {
            nn.Parameter(layout(sample, sample.start.clone())): sample for sample in samples
        }
        parameters.update(members)
        param_groups.append({**options, "params": list(members)})
    clone = clone_of(optimizer, param_groups)
    for parameter, sample in parameters.items():
        if sample.state:
            clone.state[parameter] = {key: _small(value, sample, parameter) for key, value in sample.state.items()}
    evaluated: list[bool] = []
    for step in range(_STEPS):
        before = {parameter: parameter.detach().clone() for parameter in parameters}

        def closure(step: int = step, before: dict[Tensor, Tensor] = before) -> Tensor:
            evaluated.append(all(isinstance(old, DTensor) or torch.equal(old, new) for new, old in before.items()))
            for parameter, sample in parameters.items():
                # The gradient depends on the parameter, so the result shows where it was evaluated.
                parameter.grad = layout(sample, sample.noise[step]) + 0.1 * parameter.detach()
            return torch.ones((), requires_grad=True)

        if not apart:
            clone.step(closure=closure)  # type: ignore[arg-type]  # one without arguments
            continue
        _, kwargs = closure_first((), {"closure": closure})
        exchange = Exchange(clone, part=lambda tensor: tensor.view_as(tensor), to_whole=lambda *given: given[-1])
        exchange.begin()
        clone.step(**kwargs)
        exchange.end()
    return _SteppedSamples(
        values=[parameter.detach() for parameter in parameters],
        states=[clone.state.get(parameter, {}) for parameter in parameters],
        evaluates_again=len(evaluated) > _STEPS or not all(evaluated),
    )


def _small(value: Any, sample: _Sample, parameter: Tensor) -> Any:
    """Return state from before the first step in the sample's shape."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(parameter, requires_grad=False) if value.shape == sample.like.shape else value.clone()


def _divide(sample: _Sample, tensor: Tensor) -> Tensor:
    if not isinstance(sample.like, DTensor):
        return tensor
    return divided(tensor, sample.like)


def _half(dim: int, part: int, sample: _Sample, tensor: Tensor) -> Tensor:
    return tensor.chunk(2, dim)[part].clone() if dim in divided_dims(sample.like) else tensor


def _joined(dim: int, samples: list[_Sample], first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [
        torch.cat([one, other], dim) if dim in divided_dims(sample.like) else one
        for sample, one, other in zip(samples, first, second, strict=True)
    ]


def _same(samples: list[_Sample], expected: list[Tensor], found: list[Tensor]) -> bool:
    """Return whether two ways to step made the same change, up to rounding."""
    for sample, one, other in zip(samples, expected, found, strict=True):
        change = (one - sample.start).norm()
        if not bool((other - one).norm() <= _TOLERANCE * change):
            return False
    return True


def _full(tensor: Tensor) -> Tensor:
    return full(tensor) if isinstance(tensor, DTensor) else tensor


def _sorted_keys(
    samples: list[_Sample], whole: _SteppedSamples, *parts: _SteppedSamples
) -> tuple[frozenset[str], dict[str, int]]:
    """Return the keys of state that is equal for shards and the full parameter, and the block sizes of other state.

    State of the parameter's own shape, and state that is no tensor, is in neither.
    """
    equal: set[str] = set()
    blocks: dict[str, int] = {}
    for index, sample in enumerate(samples):
        for key, value in whole.states[index].items():
            if (
                not isinstance(sample.like, DTensor)
                or not isinstance(value, Tensor)
                or value.shape == sample.start.shape
            ):
                continue
            pieces = [part.states[index][key] for part in parts]
            if all(piece.shape == value.shape and torch.equal(piece, value) for piece in pieces):
                equal.add(key)
            else:
                size, rest = divmod(sample.start.numel(), value.numel())
                blocks[key] = 0 if rest else size
    return frozenset(equal - blocks.keys()), blocks
