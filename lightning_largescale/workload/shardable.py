"""Find which matrices of a block tensor parallelism shards, and how, by running the block on shards.

The block runs on fake tensors, all of them unsharded at first. A matrix with an unsharded input is sharded column-wise,
by its outputs. A matrix whose input is sharded in the contracted dimension is sharded row-wise, by its inputs, and the
all-reduced result is unsharded. The rules of `workload.parts` carry a sharding through the functions between (views to
heads, attention, gates, elementwise functions). Where they cannot, the shards would have to be all-gathered. Then the
matrices that the shards come from are sharded in sections, if their sections are used separately (q, k and v of one
matrix), or stay replicated, and the block runs again. The result communicates only where a sharding ends and, in
backward, where it begins. It is correct by construction.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (column and row).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lightning_largescale import compat
from lightning_largescale.workload.batch import map_tensors, tensors_in
from lightning_largescale.workload.division_run import DivisionRun
from lightning_largescale.workload.flops import FlopsOf
from lightning_largescale.workload.parts import SEQUENCE, Part, as_part, sequence_in
from lightning_largescale.workload.workload import Divided


class Subject(NamedTuple):
    """Code to run on fake tensors.

    Attributes:
        parameters: the parameters that it computes with, by name.
        others: the other tensors that it receives.
        call: runs the code.
        hidden: the tensor of `others` whose sequence the ranks may share; None if there is none.
        call_on: runs the code on another tensor in place of `hidden`.
        block: the block whose forward the code is; None if the code is not a block's forward.
    """

    parameters: Mapping[str, Tensor]
    others: Sequence[Tensor]
    call: Callable[[], Any]
    hidden: Tensor | None = None
    call_on: Callable[[Tensor], Any] | None = None
    block: nn.Module | None = None


def divide(
    block: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    ranks: int,
    *,
    shared: Collection[str] = (),
    mode: Any = None,
    like: Divided | None = None,
    declared: Mapping[str, Part] = {},
) -> Divided:
    """Find what of `block` can be sharded among `ranks`.

    Args:
        block: the block; it is not changed.
        args: the arguments of its forward; fake tensors of the same shapes suffice.
        kwargs: its keyword arguments, likewise.
        ranks: the number of ranks.
        shared: names of parameters that are used outside of the block as well, which stay replicated.
        mode: the fake tensor mode, if some tensors are fake.
        like: the result for a block of the same class and shapes, which one run then confirms.
        declared: the sharding that the model's authors declare; it is used if it requires no all-gather.

    Source: the module's docstring.
    """
    mode = compat.fake_tensor_mode() if mode is None else mode
    whole = dict.fromkeys(shared, "it is used outside of the block as well")
    subject = functools.partial(_of_block, block, args, kwargs, ranks, mode)
    return divide_subject(subject, ranks, whole, mode, like=like, declared=declared)


def divide_subject(
    subject: Callable[[], Subject],
    ranks: int,
    whole: Mapping[str, str],
    mode: Any,
    *,
    uneven: bool = False,
    like: Divided | None = None,
    declared: Mapping[str, Part] = {},
) -> Divided:
    """Find what of the parameters of a subject can be sharded among `ranks`.

    Args:
        subject: makes a new subject for each run.
        ranks: the number of ranks.
        whole: names of parameters that stay replicated, with the reason.
        mode: the fake tensor mode.
        uneven: also shard outputs whose number is not divisible by `ranks`.
        like: the result for a similar subject, which one run then confirms.
        declared: a sharding that is used if it requires no all-gather.
    """
    if like is not None:
        given = subject()
        run = DivisionRun(ranks, {**like.whole, **whole}, _stretches(like), uneven=uneven, block=given.block)
        run(given.parameters, given.call, mode)
        if run.settled and run.parts == like.parts:
            return like
    if declared:
        given = subject()
        kept = {name: "the model's own plan keeps it whole" for name in given.parameters if name not in declared}
        run = DivisionRun(ranks, {**kept, **whole}, {}, uneven=uneven, block=given.block)
        run(given.parameters, given.call, mode)
        if run.settled and run.parts == declared:
            of_matrices = {name: why for name, why in kept.items() if given.parameters[name].dim() > 1}
            return _measured(Divided(parts=run.parts, whole=of_matrices), subject, ranks, mode, uneven=uneven)
    refused, stretches = dict(whole), dict[str, tuple[int, ...]]()
    while True:
        given = subject()
        run = DivisionRun(ranks, refused, stretches, uneven=uneven, block=given.block)
        run(given.parameters, given.call, mode)
        if run.settled:
            break
        stretches |= run.separated
        refused |= {name: _why(name, why, stretches, ranks) for name, why in run.refused.items()}
    undivided = [name for name, one in given.parameters.items() if one.dim() > 1 and name not in run.parts]
    found = Divided(parts=run.parts, whole={name: refused.get(name, "it meets no product") for name in undivided})
    return _measured(found, subject, ranks, mode, uneven=uneven) if run.parts else found


def _sharing(found: Divided, subject: Callable[[], Subject], ranks: int, mode: Any) -> tuple[Divided, int] | None:
    """Return the costs if the ranks share the sequence, and the bytes saved for backward; None if they cannot."""
    given = subject()
    hidden, call_on = given.hidden, given.call_on
    if hidden is None or call_on is None:
        return None
    length = hidden.shape[1]
    run = DivisionRun(ranks, found.whole, _stretches(found), sequence=length, block=given.block)

    def call() -> Any:
        part = Part(1, (length,), SEQUENCE)
        return call_on(as_part(run.ranks.own(hidden, part), part))

    saved, flops = _cost(run, given._replace(call=call), mode)
    if not run.settled or run.parts != found.parts:
        return None
    return dataclasses.replace(Divided(), **_communicated(run), flops_share=float(flops)), saved


def _communicated(run: DivisionRun) -> dict[str, Any]:
    shapes = run.shapes
    return {
        "forward_reduced": tuple(shapes.forward),
        "backward_reduced": tuple(shapes.backward),
        "forward_halves": tuple(shapes.forward_halves),
        "backward_halves": tuple(shapes.backward_halves),
    }


def _of_block(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], ranks: int, mode: Any) -> Subject:
    buffers = {name: mode.from_tensor(one) for name, one in block.named_buffers()}
    parameters = {
        name: nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
        for name, parameter in block.named_parameters()
    }
    for name, parameter in block.named_parameters():
        # Attributes that the authors set on the parameter, which the forward may read.
        parameters[name].__dict__.update(parameter.__dict__)
    args, kwargs = map_tensors((tuple(args), dict(kwargs)), mode.from_tensor)
    given = tensors_in((args, kwargs))
    # A block may write into its arguments, such as caches of keys and values.
    args, kwargs = copied((args, kwargs))
    hidden = sequence_in((args, kwargs), ranks)

    def call() -> Any:
        return torch.func.functional_call(block, {**parameters, **buffers}, args, dict(kwargs))

    def call_on(other: Tensor) -> Any:
        own_args, own_kwargs = map_tensors((args, dict(kwargs)), lambda one: other if one is hidden else one)
        return torch.func.functional_call(block, {**parameters, **buffers}, own_args, own_kwargs)

    return Subject(parameters, [*buffers.values(), *given], call, hidden, call_on, block)


def _why(name: str, why: str, stretches: Mapping[str, tuple[int, ...]], ranks: int) -> str:
    """Return why a matrix stays replicated, also if sharding its sections was tried."""
    pieces = stretches.get(name, ())
    if len({*pieces}) != 1 or len(pieces) % ranks == 0:
        return why
    return f"its outputs are {len(pieces)} heads or stretches, of which {ranks} ranks cannot have whole ones"


def _stretches(found: Divided) -> dict[str, tuple[int, ...]]:
    return {name: part.pieces for name, part in found.parts.items() if len(part.pieces) > 1}


def _measured(found: Divided, subject: Callable[[], Subject], ranks: int, mode: Any, *, uneven: bool) -> Divided:
    """Return `found` with its costs, as shares of the costs of the unsharded subject."""
    given = subject()
    nothing = dict.fromkeys(given.parameters, "to be compared with")
    as_it_is, own = (
        DivisionRun(ranks, whole, _stretches(found), uneven=uneven, block=given.block)
        for whole in (nothing, found.whole)
    )
    saved, flops = zip(*(_cost(run, subject(), mode) for run in (as_it_is, own)), strict=True)
    shares = {"saved_share": saved[1] / max(1, saved[0]), "flops_share": flops[1] / max(1, flops[0])}
    sharing = None if uneven else _sharing(found, subject, ranks, mode)
    sequence = None
    if sharing is not None:
        sequence = dataclasses.replace(
            sharing[0], saved_share=sharing[1] / max(1, saved[0]), flops_share=shares["flops_share"]
        )
    return dataclasses.replace(found, **_communicated(own), **shares, sequence=sequence)


def _cost(run: DivisionRun, subject: Subject, mode: Any) -> tuple[int, int]:
    """Return the bytes that a run saves for backward, parameters and inputs left out, and its FLOPs."""
    saved: dict[Any, int] = {}
    reference: Any = StorageWeakRef

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[reference(storage)] = storage.nbytes()
        return tensor

    with FlopsOf() as counted, saved_tensors_hooks(keep, lambda tensor: tensor):
        run(subject.parameters, subject.call, mode)
    left_out = {reference(one.untyped_storage()) for one in (*subject.parameters.values(), *subject.others)}
    kept = sum(size for storage, size in saved.items() if storage not in left_out)
    return kept + run.shapes.kept, counted.flops


def copied(value: Any) -> Any:
    """Return a deep copy of `value` that shares its tensors."""
    with _SameTensors():
        return copy.deepcopy(value)


class _SameTensors(TorchFunctionMode):
    """Mode in which `copy.deepcopy` copies no tensors: it would read the data of fakes, which have none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.__deepcopy__ else func(*args, **(kwargs or {}))
