"""A sharded module at work: parameters gathered for each step, dropped when their shards change.

FSDP2 gathers a group before its module's forward. A Lightning module has other ways in: steps, forward called inside
steps, parts called by themselves, backward inside a step. Steps run in `run_gathered`, which FSDP2 takes for the root's
forward; hooks gather whatever else is about to run.

Source: torch.distributed.fsdp, FSDPModule and register_fsdp_forward_method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.agreement import Agreement
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.by_hand import differentiate_leaves, reduce_assigned, set_gradient
from lightning_largescale.parallel.mesh import agreement_group, data_mesh, tensor_group, tensor_mesh
from lightning_largescale.parallel.module_order import ModuleOrder
from lightning_largescale.parallel.rounds import COLLECTIVE
from lightning_largescale.parallel.watched import MIXED
from lightning_largescale.parallel.writes import Writes
from lightning_largescale.plan import Plan

_Result = TypeVar("_Result")
# Where the module keeps what is known of its sharding, and the method that FSDP takes for a forward.
_STATE, _STEP = "_largescale_sharded", "_largescale_step"
_SCRIPTED = "__prepare_scriptable__"
# How torch complains of shards where it has plain tensors, and of what it does not know of shards.
_WORDS = (
    MIXED,
    "does not have a sharding strategy registered",
    "must have the same mesh",
    "different meshes",
    "Sharding propagation failed",
    "in-place operations that require placement changes",
    "not supported for tensor subclasses",
    "Cannot flatten unevenly sharded tensor",
    "unbind along the sharded dimension",
)


@dataclass(eq=False, kw_only=True)
class Sharded:
    """How a module is sharded.

    Attributes:
        plan: the plan in force, or the last that was.
        mesh: that it is divided over.
        groups: the modules that own an FSDP group by name, the root last as "".
        beside: groups of the root's parameters in other dtypes, gathered when it is.
        owners: the group of each parameter by name, where it is not the root.
        synchronize: whether the next backward reduces gradients.
        agreement: of the ranks on what they gather and reduce; None where no other rank computes other samples.
        order: of the modules that ranks run which compute the same samples; None where there are no such ranks.
        stepping: a step runs.
        in_graph: groups whose module has run in the step and has a backward to come.
        awaits_backward: Lightning is to run the backward of a step that has run.
        in_backward: a backward runs that was announced, as `manual_backward` announces the one it runs inside a step.
        whole: the module has full parameters in the place of shards, for a block of code.
        hooks: what was registered with parts of the module.
        undo: what else was begun.
        before_gather: called in a step, and outside of its backward, before a block is gathered.
        on_parts: runs a step where tensor parallelism divides what lies outside of blocks; None where it does not.
        writes: watches the parameters of the groups.
        average: of gradients that are set by hand.
    """

    plan: Plan
    mesh: DeviceMesh
    groups: dict[str, FSDPModule] = field(default_factory=dict)
    beside: list[FSDPModule] = field(default_factory=list)
    owners: dict[str, FSDPModule] = field(default_factory=dict)
    synchronize: bool = True
    agreement: Agreement | None = None
    order: ModuleOrder | None = None
    stepping: bool = False
    awaits_backward: bool = False
    in_graph: set[nn.Module] = field(default_factory=set)
    in_backward: bool = False
    whole: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    before_gather: Callable[[], None] | None = None
    on_parts: Callable[[Callable[[], Any]], Any] | None = None
    writes: Writes = field(init=False)
    average: Average = field(init=False)

    def every_group(self) -> list[FSDPModule]:
        """Those of blocks and wrapped modules, the root's, and those beside it."""
        return [*self.groups.values(), *self.beside]


def start_gathering(module: nn.Module, state: Sharded, unsharded: Sequence[nn.Parameter] = ()) -> None:
    """Make steps of `module`, all its groups sharded, and calls outside of them find their parameters gathered.

    Args:
        module: the root.
        state: of it.
        unsharded: its parameters that FSDP ignores and whose gradients are averaged.
    """
    setattr(module, _STATE, state)
    setattr(module, _STEP, partial(_with_beside, state))
    register_fsdp_forward_method(module, _STEP)
    # A forward inside a step would end what FSDP takes for the root's: gathered twice, or dropped too early.
    compat.forget_forward(module)
    state.hooks.append(module.register_forward_pre_hook(_refuse_tracing, prepend=True))
    # By which torch.jit.script asks for a module's own form.
    object.__setattr__(module, _SCRIPTED, partial(_refuse, module, "torch.jit.script"))
    owners: dict[nn.Parameter, FSDPModule] = {
        parameter: state.owners.get(name, state.groups[""])
        for name, parameter in module.named_parameters()
        if isinstance(parameter, DTensor)
    }
    for name, group in state.groups.items():
        if name:
            announce = partial(_announce, state, name)
            state.hooks += [
                # Ahead of FSDP's own, which gathers.
                group.register_forward_pre_hook(announce, prepend=True),  # type: ignore[attr-defined]
                group.register_forward_hook(partial(_watch_backward, state)),  # type: ignore[attr-defined]
            ]
    for part in _eager_modules(module):
        own = {
            name: (parameter, owners[parameter])
            for name, parameter in part.named_parameters(recurse=False)
            if parameter in owners
        }
        if own:
            state.hooks.append(part.register_forward_pre_hook(partial(_gather, own)))
    # Else the first group to run forward would become the root for good.
    compat.become_root(module, state.beside)
    state.average = Average(state.mesh, partial(_meet_ranks, state))
    named = [*state.groups, *(f"beside {number}" for number in range(len(state.beside)))]
    groups = {name: cast(nn.Module, group) for name, group in zip(named, state.every_group(), strict=True)}

    def in_step() -> bool:
        return state.stepping

    def computes() -> bool:
        return state.stepping or state.awaits_backward

    by_hand = partial(set_gradient, in_step)
    state.writes = Writes(
        groups, average=state.average, set_gradient=by_hand, computes=computes, in_graph=state.in_graph
    )
    state.undo.callback(state.writes.stop)
    state.undo.callback(differentiate_leaves())
    # Around what watches writes, since it also takes part in what is gathered and reduced.
    watch(module, state, unsharded)


def watch(module: nn.Module, state: Sharded, unsharded: Sequence[nn.Parameter] = ()) -> None:
    """Make sure that all ranks enter the same collectives in the steps of `module`; arguments as of `start_gathering`.

    A collective, the first time.
    """
    if data_mesh(state.mesh).size() > 1:
        state.agreement = Agreement(
            module,
            cast(Mapping[str, nn.Module], state.groups),
            cast(Sequence[nn.Module], state.beside),
            unsharded,
            agreement_group(state.mesh),
            before=partial(_meet_lookups, state),
            synchronizes=lambda: state.synchronize,
        )
    if tensor_mesh(state.mesh) is not None:
        names = {part: name for name, part in module.named_modules()}
        owners_of_parameters = (part for part in _eager_modules(module) if part is not module and _owns(part))
        state.order = ModuleOrder({names[part]: part for part in owners_of_parameters}, tensor_group(state.mesh))


def stop_gathering(module: nn.Module, state: Sharded) -> None:
    """Undo `start_gathering`."""
    for watching in (state.agreement, state.order):
        if watching is not None:
            watching.stop()
    for hook in state.hooks:
        hook.remove()
    state.hooks.clear()
    state.undo.close()
    for name in gathering_attributes():
        vars(module).pop(name)


def set_plan(state: Sharded, plan: Plan) -> None:
    """Gather from now on as `plan` says, which divides as the one before."""
    for name, group in state.groups.items():
        if name:
            group.set_reshard_after_forward(plan.reshard_after_forward, recurse=False)
    state.plan = plan


def sharded_state(module: nn.Module) -> Sharded | None:
    """How `module` is sharded; None where it is not."""
    return vars(module).get(_STATE)


def gathering_attributes() -> tuple[str, ...]:
    """Names of what `start_gathering` puts among a module's attributes."""
    return _STATE, _STEP, _SCRIPTED


def run_gathered(module: nn.Module, name: str, step: Callable[[], _Result]) -> _Result:
    """Run a step of `module` with the root's parameters gathered; what it returns starts the backward.

    Args:
        module: sharded, or not.
        name: of the step.
        step: it.
    """
    state = sharded_state(module)
    if state is None or state.whole:
        return step()
    state.writes.drop_stale()
    state.in_graph.clear()
    state.stepping, state.in_backward, state.awaits_backward = True, False, False
    agreement, order = state.agreement, state.order
    try:
        with (
            contextlib.nullcontext() if agreement is None else agreement.step(name, synchronize=state.synchronize),
            contextlib.nullcontext() if order is None else order.step(name),
        ):
            result: _Result = getattr(module, _STEP)(step)
            goes_on = name == "training_step" and _goes_on(module, result)
            if agreement is not None:
                agreement.end_forward(backward=goes_on)
            state.awaits_backward = goes_on
            return result
    finally:
        state.stepping = False


def _goes_on(module: nn.Module, result: Any) -> bool:
    """Whether Lightning runs the backward of what a training step returned."""
    if not getattr(module, "automatic_optimization", True) or compat.skips_backward(module.trainer):
        return False
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in compat.leaves(result))


def begin_backward(module: nn.Module, loss: Tensor) -> None:
    """Announce that a step of the sharded `module` runs the backward of `loss`."""
    if loss.requires_grad:
        # What FSDP takes for the root's output starts its backward.
        getattr(module, _STEP)(lambda: loss)
    vars(module)[_STATE].in_backward = True


def end_backward(module: nn.Module) -> None:
    """Announce that the backward is over; if it failed, the next step does."""
    state = sharded_state(module)
    if state is not None:
        state.in_backward = state.awaits_backward = False


def gather_along(module: nn.Module, look_up_along: Callable[[], None] | None = None) -> None:
    """Take part in what other ranks gather for a step of an evaluation, for which this rank has no batch.

    Args:
        module: the root.
        look_up_along: makes this rank take part in look-ups that others begin after a block.
    """
    state = sharded_state(module)
    if state is None or state.agreement is None:
        return
    state.stepping, state.in_backward = True, False
    try:
        with state.agreement.step("evaluation", look_up_along=look_up_along or _nothing):
            # The root is gathered before ranks do anything else.
            getattr(module, _STEP)(partial(_with_wraps_gathered, state, _nothing))
            state.agreement.end_forward(backward=False)
    finally:
        state.stepping = False


def _nothing() -> None:
    pass


def meet(module: nn.Module, *which: int, point: int = COLLECTIVE) -> None:
    """Wait, in a step of `module` or its backward, if that is sharded, until all ranks are about to enter a collective.

    Args:
        module: the root.
        which: numbers that tell it from others of its kind.
        point: COLLECTIVE or LOOK_UP.
    """
    state = sharded_state(module)
    if state is not None:
        _meet_ranks(state, *which, point=point)


def _meet_ranks(state: Sharded, *which: int, point: int = COLLECTIVE) -> None:
    if state.agreement is not None:
        state.agreement.meet(*which, point=point)


def note_read(module: nn.Module, name: str, shards: Sequence[DTensor]) -> None:
    """Have the ranks compare, where they meet next, that all have read these sharded tensors of `module`."""
    state = sharded_state(module)
    if state is None or state.agreement is None:
        return
    # What is divided by tensor parallelism alone is read by ranks that run the same modules.
    tensor_parallel = tensor_mesh(state.mesh)
    if tensor_parallel is None or not any(shard.device_mesh == tensor_parallel for shard in shards):
        state.agreement.note_read(name)


def reshard(module: nn.Module) -> None:
    """Drop gathered parameters of `module`, if it is sharded: after their shards changed, or when no step follows."""
    state = sharded_state(module)
    if state is None:
        return
    for group in state.every_group():
        group.set_reshard_after_backward(True, recurse=False)
        group.reshard()


@contextmanager
def optimizing(module: nn.Module) -> Iterator[Callable[[Callable[[], _Result]], _Result]]:
    """Within, an optimizer of `module` writes into shards, also in a step that steps it; yields what runs a closure."""
    state = sharded_state(module)
    if state is None:
        yield lambda closure: closure()
        return
    before, state.stepping = state.stepping, False

    def run(closure: Callable[[], _Result]) -> _Result:
        state.stepping = before
        try:
            return closure()
        finally:
            state.stepping = False

    try:
        yield run
    finally:
        state.stepping = before


def settle(module: nn.Module) -> None:
    """Have the shards of `module`, if it is sharded, know what was written into gathered parameters and set for their
    gradients: before an optimizer steps on them. A collective.

    Raises:
        PlanError: something was written that cannot be kept.
    """
    state = sharded_state(module)
    if state is None:
        return
    state.writes.keep()
    if state.synchronize:
        groups = cast(Sequence[nn.Module], state.every_group())
        reduce_assigned(zip(groups, state.writes.groups.values(), strict=True))


def run_step(module: nn.Module, name: str, step: Callable[[], Any]) -> Any:
    """Run `step`, the step `name` of `module`, with the root's parameters gathered, as `run_gathered`.

    Raises:
        PlanError: the step computed with parameters of a block that was not gathered.
    """
    state = sharded_state(module)
    if state is not None and state.on_parts is not None:
        step = partial(state.on_parts, step)
    if state is not None and name != "training_step":
        step = partial(_with_wraps_gathered, state, step)
    try:
        result = run_gathered(module, name, step)
    except RuntimeError as error:
        if state is None or not is_of_shards(error):
            raise
        raise _computed_with_shards(name, str(error)) from error
    if state is not None and any(isinstance(leaf, DTensor) for leaf in compat.leaves(result)):
        raise _computed_with_shards(name, "its result is a DTensor")
    return result


def is_of_shards(error: Exception) -> bool:
    """Whether `error` is torch's of a function that was given shards."""
    return any(words in str(error) for words in _WORDS)


def _computed_with_shards(step: str, why: str) -> PlanError:
    return PlanError(
        f"{step} computed with parameters of blocks, or of wrapped modules, outside of these, and dp_shard has them"
        f" divided; compute that in `with self.trainer.strategy.full_parameters():`, or wrap no such module ({why})."
    )


@contextmanager
def sharded_in_place(module: nn.Module) -> Iterator[None]:
    """Within, parameters of the sharded `module` are shards, which have the gradients, also where they are gathered."""
    state = sharded_state(module)
    with ExitStack() as groups:
        if state is not None and not state.whole:
            for group in state.every_group():
                groups.enter_context(state.writes.sharded_in_place(cast(nn.Module, group)))
        yield


def forget_step(module: nn.Module) -> None:
    """Make the sharded `module` ready for a step after one that ended halfway; its gradients may be lost."""
    vars(module)[_STATE].writes.forget()
    compat.forget_sharded_step(module)
    forget_order(vars(module)[_STATE])
    reshard(module)


def forget_order(state: Sharded) -> None:
    """Know nothing of the steps so far, of which the last may have ended halfway."""
    for watching in (state.agreement, state.order):
        if watching is not None:
            watching.forget()


@contextmanager
def no_reduction(module: nn.Module) -> Iterator[None]:
    """Within, a backward of the sharded `module` keeps its gradients unreduced, without communication."""
    state: Sharded = vars(module)[_STATE]
    _set_synchronize(state, False)
    try:
        yield
    finally:
        _set_synchronize(state, True)


def _set_synchronize(state: Sharded, value: bool) -> None:
    state.synchronize = value
    for group in state.every_group():
        group.set_requires_gradient_sync(value, recurse=False)


def _with_wraps_gathered(state: Sharded, step: Callable[[], _Result]) -> _Result:
    """Run an evaluation with the modules that the plan wraps gathered for all of it, as the root is: that nothing else
    reads their parameters was seen of training.
    """
    names = () if state.whole else state.plan.wrapped_modules
    wraps = [state.groups[name] for name in names if name in state.groups]
    # As the root's, before ranks do anything else.
    before, state.before_gather = state.before_gather, None
    for group in wraps:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    state.before_gather = before
    try:
        return step()
    finally:
        for group in wraps:
            group.set_reshard_after_forward(state.plan.reshard_after_forward, recurse=False)
            group.reshard()


def _refuse_tracing(module: nn.Module, args: Any) -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        _refuse(module, "torch.jit.trace")
    if torch.compiler.is_exporting():
        _refuse(module, "torch.export")


def _refuse(module: nn.Module, by: str) -> NoReturn:
    raise PlanError(
        f"{type(module).__name__.removeprefix('FSDP')} is sharded, and {by}, which log_graph=True and exports use,"
        " takes modules with all parameters; call `trainer.strategy.make_whole()` on all ranks after fit, or leave it"
        " out."
    )


def _with_beside(state: Sharded, function: Callable[[], _Result]) -> _Result:
    """Run `function`, the root being gathered, with the groups beside it gathered too."""
    for group in state.beside:
        group.unshard()
    return function()


def _announce(state: Sharded, name: str, block: nn.Module, args: Any) -> None:
    if state.agreement is None:
        _meet_lookups(state)
    elif torch.is_grad_enabled():
        state.agreement.note_forward(name)


def _meet_lookups(state: Sharded) -> None:
    if state.before_gather is not None and state.stepping and not state.in_backward:
        state.before_gather()


def _watch_backward(state: Sharded, block: nn.Module, args: Any, output: Any) -> None:
    """Keep blocks gathered from a backward inside a step (gradient penalties, forces) until the optimizer's step.

    The step's own backward goes through it once more, and autograd holds the gathered storages, which must not be freed
    in between.
    """

    def keep(_: Tensor) -> None:
        if state.stepping and not state.in_backward:
            for group in state.every_group():
                group.set_reshard_after_backward(False, recurse=False)

    tensors = [leaf for leaf in compat.leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    compat.gather_for_backward_of(block, tensors)
    if tensors and state.stepping:
        state.in_graph.add(block)
    for tensor in tensors:
        tensor.register_hook(keep)  # type: ignore[no-untyped-call]


def _gather(own: dict[str, tuple[nn.Parameter, FSDPModule]], part: nn.Module, args: Any) -> None:
    """Gather the group of a part that is about to run, if it is not yet; freeze or unfreeze it as its shards are."""
    for name, (shard, group) in own.items():
        parameter = getattr(part, name)
        if parameter is shard:
            group.unshard()
            parameter = getattr(part, name)
        if parameter.requires_grad != shard.requires_grad:
            parameter.requires_grad_(shard.requires_grad)


def _owns(part: nn.Module) -> bool:
    return any(True for _ in part.parameters(recurse=False))


def _eager_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and all below it, but for what torch.compile traces, where a hook would break the graph."""
    yield module
    for child in module.children():
        if compat.compiled_module(child) is child:
            yield from _eager_modules(child)
