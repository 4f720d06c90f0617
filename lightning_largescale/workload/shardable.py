"""Which matrices of a block tensor parallelism divides, and how: found by running the block on parts.

The block runs on fake tensors, all of them whole at first. A matrix that meets a whole input is divided by its outputs
("column"); one that meets an input that is divided where it is contracted, by its inputs ("row"), and the sums over the
ranks are whole. What lies between (views to heads, attention, gates, functions of elements) is carried by the rules of
`workload.parts`. Where they cannot carry a division it would have to be gathered: then the matrices that it came from
are divided in stretches, if it is that stretches of it go different ways (q, k and v of one matrix), or stay whole; and
the block runs again. What is left communicates where a division ends and, in backward, where it begins, and nowhere
else; and it is right by construction.

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
from lightning_largescale.workload.parts import SEQUENCE, Part, as_part, sequence_in
from lightning_largescale.workload.tracker import FlopsOf
from lightning_largescale.workload.workload import Divided


class Subject(NamedTuple):
    """Code to be run, on fake tensors.

    Attributes:
        parameters: what it computes with, by name.
        others: other tensors that it is given.
        call: runs it.
        hidden: of the others, the one whose sequence ranks may share; None without such.
        call_on: runs it on another one for that.
        block: whose forward it is; None where it is more than that.
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
    """Find what of `block` can be divided among `ranks`.

    Args:
        block: nothing of it is changed.
        args: what its forward is called with, tensors of the same shapes; fake ones do.
        kwargs: likewise.
        ranks: number of them.
        shared: names of parameters that others use as well, which stay whole.
        mode: of the fake tensors, where some are given.
        like: what was found of a block of the same class and shapes, which one run then confirms.
        declared: what its authors want divided; that is what is divided, if nothing has to be gathered then.

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
    """Find what of the parameters of a subject can be divided among `ranks`.

    Args:
        subject: made anew for each run.
        ranks: number of them.
        whole: names of parameters that stay whole, and why.
        mode: of the fake tensors.
        uneven: numbers of outputs that ranks cannot have alike are divided too.
        like: what was found of a like subject, which one run then confirms.
        declared: what is divided if nothing has to be gathered then.
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
    """What is divided of a subject costs where ranks share the sequence, and the bytes it saves; None: they cannot."""
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
        # What its authors have noted on it, which its forward may read.
        parameters[name].__dict__.update(parameter.__dict__)
    args, kwargs = map_tensors((tuple(args), dict(kwargs)), mode.from_tensor)
    given = tensors_in((args, kwargs))
    # A block may write into objects that it is given, such as caches of keys and values.
    args, kwargs = copied((args, kwargs))
    hidden = sequence_in((args, kwargs), ranks)

    def call() -> Any:
        return torch.func.functional_call(block, {**parameters, **buffers}, args, dict(kwargs))

    def call_on(other: Tensor) -> Any:
        own_args, own_kwargs = map_tensors((args, dict(kwargs)), lambda one: other if one is hidden else one)
        return torch.func.functional_call(block, {**parameters, **buffers}, own_args, own_kwargs)

    return Subject(parameters, [*buffers.values(), *given], call, hidden, call_on, block)


def _why(name: str, why: str, stretches: Mapping[str, tuple[int, ...]], ranks: int) -> str:
    """Why a matrix stays whole, where it was tried to divide stretches of it."""
    pieces = stretches.get(name, ())
    if len({*pieces}) != 1 or len(pieces) % ranks == 0:
        return why
    return f"its outputs are {len(pieces)} heads or stretches, of which {ranks} ranks cannot have whole ones"


def _stretches(found: Divided) -> dict[str, tuple[int, ...]]:
    return {name: part.pieces for name, part in found.parts.items() if len(part.pieces) > 1}


def _measured(found: Divided, subject: Callable[[], Subject], ranks: int, mode: Any, *, uneven: bool) -> Divided:
    """`found` with what it costs, as shares of what the subject costs as it is."""
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
    """Bytes that a run saves for backward, parameters and inputs left out, and its floating-point operations."""
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
    """A deep copy of `value` with the same tensors in it."""
    with _SameTensors():
        return copy.deepcopy(value)


class _SameTensors(TorchFunctionMode):
    """Within, `copy.deepcopy` copies no tensors: of fakes it would read what they do not have."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.__deepcopy__ else func(*args, **(kwargs or {}))
