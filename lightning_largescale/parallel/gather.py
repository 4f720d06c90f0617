"""Hooks of a sharded module that unshard the FSDP group of whatever module is about to run.

Source: torch.distributed.fsdp, FSDPModule and register_fsdp_forward_method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.agreement import Agreement
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.by_hand import differentiate_leaves, set_gradient
from lightning_largescale.parallel.compile import is_compiled_block
from lightning_largescale.parallel.mesh import agreement_group, data_group, data_mesh, tensor_group, tensor_mesh
from lightning_largescale.parallel.module_order import ModuleOrder
from lightning_largescale.parallel.sharded import SCRIPTED, STATE, STEP, Sharded, gathering_attributes
from lightning_largescale.parallel.writes import Writes

_Result = TypeVar("_Result")


def start_gathering(module: nn.Module, state: Sharded, unsharded: Sequence[nn.Parameter] = ()) -> None:
    """Make steps of `module`, and calls outside of steps, unshard the parameters that they use.

    Args:
        module: the root, with all its groups sharded.
        state: the sharding of `module`.
        unsharded: parameters that FSDP ignores and whose gradients are averaged.
    """
    setattr(module, STATE, state)
    setattr(module, STEP, partial(_with_beside, state))
    register_fsdp_forward_method(module, STEP)
    # FSDP takes the step for the root's forward; a forward inside it would unshard twice, or reshard too early.
    compat.forget_forward(module)
    state.hooks.append(module.register_forward_pre_hook(_refuse_tracing, prepend=True))
    object.__setattr__(module, SCRIPTED, partial(_refuse, module, "torch.jit.script"))
    _hook_groups(state)
    _hook_owners(module, state)
    # Otherwise the first group to run forward would stay the root for good.
    compat.become_root(module, state.beside)
    _watch_writes(state)
    # Last, around what watches writes, since it also takes part in the collectives of other ranks.
    watch(module, state, unsharded)


def _hook_groups(state: Sharded) -> None:
    for name, group in state.groups.items():
        if name:
            announce = partial(_announce, state, name)
            state.hooks += [
                # Before FSDP's own hook, which unshards.
                group.register_forward_pre_hook(announce, prepend=True),  # type: ignore[attr-defined]
                group.register_forward_hook(partial(_watch_backward, state)),  # type: ignore[attr-defined]
            ]


def _hook_owners(module: nn.Module, state: Sharded) -> None:
    owners: dict[nn.Parameter, FSDPModule] = {
        parameter: state.owners.get(name, state.groups[""])
        for name, parameter in module.named_parameters()
        if isinstance(parameter, DTensor)
    }
    for part, inner in _eager_modules(module):
        own = [
            (one, name, parameter, owners[parameter])
            for one in inner
            for name, parameter in one.named_parameters(recurse=False)
            if parameter in owners
        ]
        if own:
            state.hooks.append(part.register_forward_pre_hook(partial(_unshard_owners, own)))


def _watch_writes(state: Sharded) -> None:
    state.average = Average(state.mesh, state.meet)
    named = [*state.groups, *(f"beside {number}" for number in range(len(state.beside)))]
    groups = {name: cast(nn.Module, group) for name, group in zip(named, state.every_group(), strict=True)}
    state.writes = Writes(
        groups,
        average=state.average,
        set_gradient=partial(set_gradient, lambda: state.stepping),
        computes=lambda: state.stepping or state.awaits_backward,
        in_graph=state.in_graph,
    )
    state.undo.callback(state.writes.stop)
    state.undo.callback(differentiate_leaves())


def watch(module: nn.Module, state: Sharded, unsharded: Sequence[nn.Parameter] = ()) -> None:
    """Make all ranks enter the same collectives in the steps of `module`; a collective, the first time.

    Args:
        module: as for `start_gathering`.
        state: as for `start_gathering`.
        unsharded: as for `start_gathering`.
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
        owners = (part for part, inner in _eager_modules(module) if part is not module and any(map(_owns, inner)))
        state.order = ModuleOrder({names[part]: part for part in owners}, tensor_group(state.mesh))


def renew_groups(state: Sharded) -> None:
    """Replace process groups that were ended since, as after a failed fit; a collective if there are any.

    The groups of `state.mesh` itself, which FSDP2 uses too, are not replaced.
    """
    if state.agreement is not None:
        state.agreement.ranks = agreement_group(state.mesh)
    if state.order is not None:
        state.order.ranks = tensor_group(state.mesh)
    if data_mesh(state.mesh).ndim > 1:
        state.average.group = data_group(state.mesh)


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
    """Run `function`, for which the root is unsharded, with the groups beside the root unsharded too."""
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
    """Keep blocks unsharded from a backward inside a step (gradient penalties, forces) until the optimizer's step.

    The step's own backward passes them once more, and autograd holds the unsharded storages, which must not be freed in
    between.
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


def _unshard_owners(own: Sequence[tuple[nn.Module, str, nn.Parameter, FSDPModule]], part: nn.Module, args: Any) -> None:
    """Unshard the groups of the parameters of a submodule that is about to run, and freeze the leaves as the shards."""
    for module, name, shard, group in own:
        parameter = getattr(module, name)
        if parameter is shard:
            group.unshard()
            parameter = getattr(module, name)
        if parameter.requires_grad != shard.requires_grad:
            parameter.requires_grad_(shard.requires_grad)


def _owns(part: nn.Module) -> bool:
    return any(True for _ in part.parameters(recurse=False))


def _eager_modules(module: nn.Module) -> Iterator[tuple[nn.Module, Sequence[nn.Module]]]:
    """Yield each module whose hooks torch.compile does not trace, with the modules that run after its hooks only."""
    if is_compiled_block(module):
        yield module, [*module.modules()]
        return
    yield module, [module]
    for child in module.children():
        if compat.compiled_module(child) is child:
            yield from _eager_modules(child)
