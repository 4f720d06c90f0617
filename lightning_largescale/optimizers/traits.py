"""Detection of how an optimizer can step on sharded parameters and tables, by a trial on small tensors.

Most optimizers are elementwise: a step on each rank's shard equals a step on the full parameter. Others mix elements
(factored moments, trust ratios, orthogonalization): they must be able to step on DTensors. An optimizer of a
row-sharded table must accept sparse gradients, treat rows independently, and keep state of the table's shape or
scalars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_largescale import comm
from lightning_largescale.errors import PlanError
from lightning_largescale.optimizers.local_view import options_of
from lightning_largescale.optimizers.trial import (
    LARGE_SIDES,
    SMALL_SIDES,
    Sample,
    SteppedSamples,
    UntriedError,
    draw,
    in_words,
    same,
    step_in_view,
    step_samples,
    step_with_closure,
    step_without_closure,
    undisturbed,
    whole,
)

# A small table, its rows that get a gradient, and the row at which it is split in two.
_TABLE_SIDES, _TOUCHED, _CUT = (8, 4), (1, 2, 6), 4

_InitialState = Mapping[Tensor, Mapping[str, Any]]


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


def sharded_traits(optimizer: Optimizer, initial: _InitialState) -> OptimizerTraits:
    """Return how `optimizer` can step if some of its parameters are DTensors; a collective, equal on all ranks.

    Args:
        optimizer: the optimizer, with the same groups on all ranks.
        initial: the state that parameters had before the first step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters) or _known_to_step(optimizer, parameters):
        return OptimizerTraits()
    with undisturbed(parameters[0].device):
        answer = _tried(optimizer, *_samples(optimizer, initial))
    return _agreed(answer)


def shard_count(parameter: Tensor) -> int:
    """Return the number of shards of `parameter`."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(axis) for axis, one in enumerate(parameter.placements) if _dim_of(one) is not None)


def _dim_of(placement: Placement) -> int | None:
    # The placement of FSDP2 for a dimension that tensor parallelism also shards is no `Shard`, but has a `dim`.
    return getattr(placement, "dim", None)


def _dims_of(tensor: Tensor) -> set[int]:
    """Return the dimensions that `tensor` is sharded along."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return {dim for placement in placements if (dim := _dim_of(placement)) is not None}


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
    options = [value for group in optimizer.param_groups for value in options_of(group).values()]
    if len(meshes) > 1 or any(isinstance(value, Tensor) for value in options):
        return False
    kind = type(optimizer)
    return kind in (Adam, AdamW) or (kind is SGD and not any(group["fused"] for group in optimizer.param_groups))


def _tried(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> OptimizerTraits:
    steps = partial(step_samples, optimizer, groups, samples)
    try:
        full = steps(whole, step_with_closure)
    except Exception as error:
        return OptimizerTraits(refusal=f"small tensors to try it on are not accepted ({in_words(error)})", untried=True)
    if full.evaluates_again:
        return OptimizerTraits(
            refusal="it evaluates the loss again within its step, and forward and backward run once a step"
        )
    expected = [value for (value,) in full.values]
    if all(torch.equal(value, sample.start) for value, sample in zip(expected, samples, strict=True)):
        return OptimizerTraits(refusal="it changed nothing when it was tried on small tensors", untried=True)
    try:
        sharded = steps(_shard, step_with_closure)
        if all(map(same, samples, expected, [_full(value) for (value,) in sharded.values])):
            return OptimizerTraits()
        failure = "its steps on DTensors are not those on whole parameters"
    except Exception as error:
        failure = f"it does not step on DTensors ({in_words(error)})"
    sizes: dict[str, int | None] = {}
    for dim in sorted({dim for sample in samples for dim in _dims_of(sample.like)}):
        try:
            halves = [steps(partial(_half, dim, number), step_in_view) for number in range(2)]
        except Exception as error:
            return OptimizerTraits(refusal=f"{failure}, nor on parts of parameters ({in_words(error)})")
        if not all(map(same, samples, expected, _joined(dim, samples, halves))):
            return OptimizerTraits(refusal=f"{failure}, and its step on a parameter is not that on its parts")
        for sample, (state,), (one,), (other,) in zip(
            samples, full.states, *(half.states for half in halves), strict=True
        ):
            if isinstance(sample.like, DTensor):
                _note_sizes(sizes, sample.start, state, one, other)
    return OptimizerTraits(
        local=True,
        whole_keys=frozenset(key for key, size in sizes.items() if size is None),
        block_sizes={key: size for key, size in sizes.items() if size is not None},
    )


def _note_sizes(
    sizes: dict[str, int | None], start: Tensor, state: Mapping[str, Any], *halves: Mapping[str, Any]
) -> None:
    """Note the block sizes of state of other shapes than the parameter's; None if it is equal for both halves."""
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape == start.shape:
            continue
        if all(half[key].shape == value.shape and torch.equal(half[key], value) for half in halves):
            sizes.setdefault(key, None)
        else:
            size, rest = divmod(start.numel(), value.numel())
            sizes[key] = 0 if rest else size


def _samples(optimizer: Optimizer, initial: _InitialState) -> tuple[list[Mapping[str, Any]], list[Sample]]:
    """Return one group per set of options, and one sample per group, kind of parameter and size."""
    groups: dict[str, Mapping[str, Any]] = {}
    samples: dict[Any, Sample] = {}
    shards = max(shard_count(parameter) for group in optimizer.param_groups for parameter in group["params"])
    for group in optimizer.param_groups:
        options = {name: value for name, value in options_of(group).items() if name not in ("lr", "initial_lr")}
        groups.setdefault(repr(options), group)
        number = [*groups].index(repr(options))
        for like in group["params"]:
            for sides in (SMALL_SIDES, LARGE_SIDES) if like.dim() else (SMALL_SIDES,):
                kind = (number, sides, like.dim(), like.dtype, isinstance(like, DTensor))
                if kind not in samples:
                    start, *noise = draw(_shape(sides, like.dim(), shards), like, seed=len(samples))
                    state = initial.get(like, {})
                    samples[kind] = Sample(group=number, like=like, start=start, noise=noise, state=state)
    return [*groups.values()], [*samples.values()]


def _shape(sides: tuple[int, int], dims: int, shards: int) -> Sequence[int]:
    # A number of rows that is divisible by the ranks, and by two.
    rows, columns = 2 * shards * math.ceil(sides[0] / (2 * shards)), sides[1]
    return () if not dims else (rows * columns,) if dims == 1 else (rows, columns, *[2] * (dims - 2))


def _shard(sample: Sample, tensor: Tensor) -> Sequence[Tensor]:
    like = sample.like
    if not isinstance(like, DTensor):
        return [tensor]
    return [distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)]


def _full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    for axis in range(tensor.device_mesh.ndim):
        # torch warns if it gathers over several axes at once.
        placements = [Replicate()] * (axis + 1) + [*tensor.placements[axis + 1 :]]
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def _half(dim: int, number: int, sample: Sample, tensor: Tensor) -> Sequence[Tensor]:
    return [tensor.chunk(2, dim)[number].clone() if dim in _dims_of(sample.like) else tensor]


def _joined(dim: int, samples: Sequence[Sample], halves: Sequence[SteppedSamples]) -> list[Tensor]:
    return [
        torch.cat([one, other], dim) if dim in _dims_of(sample.like) else one
        for sample, (one,), (other,) in zip(samples, *(half.values for half in halves), strict=True)
    ]


def check_takes_rows(optimizer: Optimizer, tables: Mapping[Tensor, str], initial: _InitialState) -> None:
    """Make sure that `optimizer` can step on the row-sharded tables among its parameters.

    Args:
        optimizer: an optimizer of any parameters.
        tables: names of the module's row-sharded tables.
        initial: the state that parameters had before the first step.

    Raises:
        PlanError: it cannot; the message names optimizers that can.
    """
    for group in optimizer.param_groups:
        for table in group["params"] if tables else ():
            if table not in tables or not table.requires_grad:
                continue
            try:
                why = _refusal(optimizer, group, table, initial.get(table, {}))
                kind = PlanError
            except Exception as error:
                why, kind = f"it takes no sparse gradient ({in_words(error)})", UntriedError
            if why is not None:
                raise kind(
                    f"{type(optimizer).__name__} cannot train the row-sharded table {tables[table]!r}: {why}; give"
                    " tables to torch.optim.SGD, Adagrad or SparseAdam, under manual optimization an optimizer of"
                    " their own, or leave them out of row_sharded_embeddings."
                )


def _refusal(optimizer: Optimizer, group: Mapping[str, Any], table: Tensor, state: Mapping[str, Any]) -> str | None:
    start, *noise = draw(_TABLE_SIDES, table, seed=0)
    for one in noise:
        one[[row for row in range(len(one)) if row not in _TOUCHED]] = 0
    sample = Sample(like=table, start=start, noise=noise, state=state, sparse=True)
    with undisturbed(table.device):
        splits = [partial(_rows, part) for part in (slice(None), slice(_CUT), slice(_CUT, None))]
        full, *halves = (step_samples(optimizer, [group], [sample], one, step_without_closure) for one in splits)
    ((value,),), ((state,),) = full.values, full.states
    if not same(sample, value, torch.cat([half.values[0][0] for half in halves])):
        return "its step on a table is not that on its rows"
    for key, one in state.items():
        if isinstance(one, Tensor) and one.dim() and one.shape != value.shape:
            return f"it keeps {key!r} of shape {tuple(one.shape)} for a table of shape {tuple(value.shape)}"
    return None


def _rows(rows: slice, sample: Sample, tensor: Tensor) -> Sequence[Tensor]:
    return [tensor[rows]]
