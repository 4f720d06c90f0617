"""A sharded module at work: parameters gathered for each step, dropped when their shards change.

FSDP2 gathers a group before its module's forward. A Lightning module has other ways in: steps, forward called inside
steps, parts called by themselves, backward inside a step. Steps run in `run_gathered`, which FSDP2 takes for the root's
forward; hooks gather whatever else is about to run.

Source: torch.distributed.fsdp, FSDPModule and register_fsdp_forward_method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_largescale import compat
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.by_hand import differentiate_leaves, reduce_assigned, set_gradient
from lightning_largescale.parallel.watched import MIXED
from lightning_largescale.parallel.writes import Writes
from lightning_largescale.plan import Plan, PlanError

_Result = TypeVar("_Result")
# Where the module keeps what is known of its sharding, and the method that FSDP takes for a forward.
_STATE, _STEP = "_largescale_sharded", "_largescale_step"
# How torch complains of shards where it has plain tensors, or no rule for them.
_MIXED = (MIXED, "does not have a sharding strategy registered")


@dataclass(eq=False, kw_only=True)
class Sharded:
    """How a module is sharded.

    Attributes:
        plan: the plan in force, or the last that was.
        mesh: that it is divided over.
        groups: the modules that own an FSDP group by name, the root last as "".
        owners: the group of each parameter by name, where it is not the root.
        synchronize: whether the next backward reduces gradients.
        gathered: names of the groups that the last step gathered, in its order, but for the root.
        stepping: a step runs.
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
    owners: dict[str, FSDPModule] = field(default_factory=dict)
    synchronize: bool = True
    gathered: list[str] = field(default_factory=list)
    stepping: bool = False
    in_backward: bool = False
    whole: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    before_gather: Callable[[], None] | None = None
    on_parts: Callable[[Callable[[], Any]], Any] | None = None
    writes: Writes = field(init=False)
    average: Average = field(init=False)


def start_gathering(module: nn.Module, state: Sharded) -> None:
    """Make steps of `module`, all its groups sharded, and calls outside of them find their parameters gathered."""
    setattr(module, _STATE, state)
    setattr(module, _STEP, lambda function: function())
    register_fsdp_forward_method(module, _STEP)
    # A forward inside a step would end what FSDP takes for the root's: gathered twice, or dropped too early.
    compat.forget_forward(module)
    owners: dict[nn.Parameter, FSDPModule] = {
        parameter: state.owners.get(name, state.groups[""])
        for name, parameter in module.named_parameters()
        if isinstance(parameter, DTensor)
    }
    for name, group in state.groups.items():
        if name:
            state.hooks += [
                # Ahead of FSDP's own, which gathers.
                group.register_forward_pre_hook(partial(_announce, state), prepend=True),  # type: ignore[attr-defined]
                group.register_forward_pre_hook(partial(_note, state, name)),  # type: ignore[attr-defined]
                group.register_forward_hook(partial(_watch_backward, module, state)),  # type: ignore[attr-defined]
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
    compat.become_root(module)
    state.average = Average(state.mesh)
    groups = {name: cast(nn.Module, group) for name, group in state.groups.items()}
    by_hand = partial(set_gradient, lambda: state.stepping)
    state.writes = Writes(groups, average=state.average, set_gradient=by_hand)
    state.undo.callback(state.writes.stop)
    state.undo.callback(differentiate_leaves())


def stop_gathering(module: nn.Module, state: Sharded) -> None:
    """Undo `start_gathering`."""
    for hook in state.hooks:
        hook.remove()
    state.hooks.clear()
    state.undo.close()
    del vars(module)[_STATE], vars(module)[_STEP]


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
    return _STATE, _STEP


def run_gathered(module: nn.Module, function: Callable[[], _Result]) -> _Result:
    """Run `function`, a step of `module`, with the root's parameters gathered; what it returns starts the backward."""
    state = sharded_state(module)
    if state is None or state.whole:
        return function()
    state.gathered.clear()
    state.stepping, state.in_backward = True, False
    try:
        result: _Result = getattr(module, _STEP)(function)
    finally:
        state.stepping = False
    return result


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
        state.in_backward = False


def gather_along(module: nn.Module) -> None:
    """Gather what a step of the sharded `module` gathers, for ranks that run one while this rank has nothing to do."""
    state = sharded_state(module)
    assert state is not None
    order = list(state.gathered) or [name for name in state.groups if name]

    def visit() -> None:
        for name in order:
            if name in state.plan.wrapped_modules:
                continue
            state.groups[name].unshard()
            if state.plan.reshard_after_forward:
                state.groups[name].reshard()

    run_gathered(module, partial(_with_wraps_gathered, state, visit))
    state.gathered.extend(order)


def reshard(module: nn.Module) -> None:
    """Drop gathered parameters of `module`, if it is sharded: after their shards changed, or when no step follows."""
    state = sharded_state(module)
    if state is None:
        return
    module.set_reshard_after_backward(True)  # type: ignore[operator]
    for group in state.groups.values():
        group.reshard()


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
        reduce_assigned((cast(nn.Module, state.groups[name]), found) for name, found in state.writes.groups.items())


def run_step(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run the step `name` of `module` with the root's parameters gathered, as `run_gathered`.

    Raises:
        PlanError: the step computed with parameters of a block that was not gathered.
    """
    state = sharded_state(module)
    step = partial(getattr(module, name), *args, **kwargs)
    if state is not None and state.on_parts is not None:
        step = partial(state.on_parts, step)
    if state is not None and name != "training_step":
        step = partial(_with_wraps_gathered, state, step)
    try:
        result = run_gathered(module, step)
    except RuntimeError as error:
        if state is None or not any(words in str(error) for words in _MIXED):
            raise
        raise _computed_with_shards(name, str(error)) from error
    if state is not None and any(isinstance(leaf, DTensor) for leaf in compat.leaves(result)):
        raise _computed_with_shards(name, "its result is a DTensor")
    return result


def _computed_with_shards(step: str, why: str) -> PlanError:
    return PlanError(
        f"{step} computed with parameters of blocks, or of wrapped modules, outside of these, and dp_shard has them"
        f" divided; compute that in `with self.trainer.strategy.full_parameters():`, or wrap no such module ({why})."
    )


def forget_step(module: nn.Module) -> None:
    """Make the sharded `module` ready for a step after one that ended halfway; its gradients may be lost."""
    vars(module)[_STATE].writes.forget()
    compat.forget_sharded_step(module)
    reshard(module)


@contextmanager
def no_reduction(module: nn.Module) -> Iterator[None]:
    """Within, a backward of the sharded `module` keeps its gradients unreduced, without communication."""
    state = vars(module)[_STATE]
    module.set_requires_gradient_sync(False)  # type: ignore[operator]
    state.synchronize = False
    try:
        yield
    finally:
        state.synchronize = True
        module.set_requires_gradient_sync(True)  # type: ignore[operator]


def _with_wraps_gathered(state: Sharded, step: Callable[[], _Result]) -> _Result:
    """Run an evaluation with the modules that the plan wraps gathered for all of it, as the root is: that nothing else
    reads their parameters was seen of training.
    """
    names = () if state.whole else state.plan.wrapped_modules
    wraps = [state.groups[name] for name in names if name in state.groups]
    for group in wraps:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        return step()
    finally:
        for group in wraps:
            group.set_reshard_after_forward(state.plan.reshard_after_forward, recurse=False)
            group.reshard()


def _announce(state: Sharded, block: nn.Module, args: Any) -> None:
    if state.before_gather is not None and state.stepping and not state.in_backward:
        state.before_gather()


def _note(state: Sharded, name: str, block: nn.Module, args: Any) -> None:
    if state.stepping:
        state.gathered.append(name)


def _watch_backward(module: nn.Module, state: Sharded, block: nn.Module, args: Any, output: Any) -> None:
    """Keep blocks gathered from a backward inside a step (gradient penalties, forces) until the optimizer's step.

    The step's own backward goes through it once more, and autograd holds the gathered storages, which must not be freed
    in between.
    """

    def keep(_: Tensor) -> None:
        if state.stepping and not state.in_backward:
            module.set_reshard_after_backward(False)  # type: ignore[operator]

    tensors = [leaf for leaf in compat.leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    compat.gather_for_backward_of(block, tensors)
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


def _eager_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and all below it, but for what torch.compile traces, where a hook would break the graph."""
    yield module
    for child in module.children():
        if compat.compiled_module(child) is child:
            yield from _eager_modules(child)
