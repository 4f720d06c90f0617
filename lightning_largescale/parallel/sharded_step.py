"""Steps of a sharded module: parameters unsharded for each step, and resharded when their shards change.

FSDP2 unshards a group before its module's forward. A Lightning module has other ways in: steps, forward called inside
steps, submodules called by themselves, backward inside a step. Steps run in `run_gathered`, which FSDP2 takes for the
root's forward; hooks (`parallel.gather`) unshard any other group whose module is about to run.

Source: torch.distributed.fsdp, FSDPModule and register_fsdp_forward_method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.by_hand import reduce_assigned
from lightning_largescale.parallel.shard_writes import MIXED
from lightning_largescale.parallel.sharded import STATE, STEP, Sharded, forget_order, reshard, sharded_state

_Result = TypeVar("_Result")
# Parts of torch's errors for shards in place of plain tensors, and for operations that shards do not support.
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


def run_step(module: nn.Module, name: str, step: Callable[[], Any]) -> Any:
    """Run `step`, the step `name` of `module`, with the root's parameters unsharded, as `run_gathered`.

    Args:
        module: the root.
        name: the name of the step, such as "training_step".
        step: the step, without arguments.

    Raises:
        PlanError: the step computed with parameters of a block that was not unsharded.
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


def run_gathered(module: nn.Module, name: str, step: Callable[[], _Result]) -> _Result:
    """Run a step of `module` with the root's parameters unsharded; the backward starts from its result.

    Args:
        module: the module, sharded or not.
        name: the name of the step.
        step: runs it.
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
            result: _Result = getattr(module, STEP)(step)
            goes_on = name == "training_step" and _goes_on(module, result)
            if agreement is not None:
                agreement.end_forward(backward=goes_on)
            state.awaits_backward = goes_on
            return result
    finally:
        state.stepping = False


def _goes_on(module: nn.Module, result: Any) -> bool:
    """Return whether Lightning runs the backward of the result of a training step."""
    if not getattr(module, "automatic_optimization", True) or compat.skips_backward(module.trainer):
        return False
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in compat.leaves(result))


def begin_backward(module: nn.Module, loss: Tensor) -> None:
    """Announce that a step of the sharded `module` runs the backward of `loss`."""
    if loss.requires_grad:
        # FSDP's backward starts from the result of what it takes for the root's forward.
        getattr(module, STEP)(lambda: loss)
    vars(module)[STATE].in_backward = True


def end_backward(module: nn.Module) -> None:
    """Announce that the backward is over; after a failed one, the next step does so."""
    state = sharded_state(module)
    if state is not None:
        state.in_backward = state.awaits_backward = False


def gather_along(module: nn.Module, look_up_along: Callable[[], None] | None = None) -> None:
    """Take part in the all-gathers of other ranks for an evaluation step for which this rank has no batch.

    Args:
        module: the root.
        look_up_along: takes part in look-ups that other ranks begin after a block.
    """
    state = sharded_state(module)
    if state is None or state.agreement is None:
        return
    state.stepping, state.in_backward = True, False
    try:
        with state.agreement.step("evaluation", look_up_along=look_up_along or _nothing):
            # The root's all-gather comes before all else.
            getattr(module, STEP)(partial(_with_wraps_gathered, state, _nothing))
            state.agreement.end_forward(backward=False)
    finally:
        state.stepping = False


def _nothing() -> None:
    pass


@contextmanager
def optimizing(module: nn.Module) -> Iterator[Callable[[Callable[[], _Result]], _Result]]:
    """Context in which an optimizer of `module` writes into shards, also inside a step.

    Yields:
        A function that runs a closure as part of that step.
    """
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
    """Copy writes into unsharded parameters of `module`, and gradients set by hand, to its shards; a collective.

    Called before an optimizer steps on the shards.

    Raises:
        PlanError: a value that was written cannot be kept.
    """
    state = sharded_state(module)
    if state is None:
        return
    state.writes.keep()
    if state.synchronize:
        groups = cast(Sequence[nn.Module], state.every_group())
        reduce_assigned(zip(groups, state.writes.groups.values(), strict=True))


def is_of_shards(error: Exception) -> bool:
    """Return whether torch raised `error` because a function received shards."""
    return any(words in str(error) for words in _WORDS)


def _computed_with_shards(step: str, why: str) -> PlanError:
    return PlanError(
        f"{step} computed with parameters of blocks, or of wrapped modules, outside of these, and dp_shard has them"
        f" divided; compute that in `with self.trainer.strategy.full_parameters():`, or wrap no such module ({why})."
    )


@contextmanager
def sharded_in_place(module: nn.Module) -> Iterator[None]:
    """Context in which parameters of the sharded `module` are shards with their gradients, even if unsharded before."""
    state = sharded_state(module)
    with ExitStack() as groups:
        if state is not None and not state.whole:
            for group in state.every_group():
                groups.enter_context(state.writes.sharded_in_place(cast(nn.Module, group)))
        yield


def forget_step(module: nn.Module) -> None:
    """Reset the sharded `module` after a step that ended halfway; its gradients may be lost."""
    vars(module)[STATE].writes.forget()
    compat.forget_sharded_step(module)
    forget_order(vars(module)[STATE])
    reshard(module)


@contextmanager
def no_reduction(module: nn.Module) -> Iterator[None]:
    """Context in which a backward of the sharded `module` keeps its gradients unreduced, without communication."""
    state: Sharded = vars(module)[STATE]
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
    """Run an evaluation step with the wrapped modules unsharded throughout, as the root is.

    Only training was traced, so other modules may read their parameters here.
    """
    names = () if state.whole else state.plan.extra_fsdp_modules
    wraps = [state.groups[name] for name in names if name in state.groups]
    # Like the root's, these all-gathers come before all else.
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
