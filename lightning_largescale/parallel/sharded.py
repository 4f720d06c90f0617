"""The state of a sharded module, which its steps, its copies and its checkpoints share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_largescale.parallel.agreement import Agreement
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.mesh import tensor_mesh
from lightning_largescale.parallel.module_order import ModuleOrder
from lightning_largescale.parallel.restore import Before
from lightning_largescale.parallel.rounds import COLLECTIVE
from lightning_largescale.parallel.writes import Writes
from lightning_largescale.plan import Plan

# Attributes of a sharded module: its state, and the method that FSDP2 takes for its forward.
STATE, STEP = "_largescale_sharded", "_largescale_step"
# Attribute by which torch.jit.script asks for a module's own form.
SCRIPTED = "__prepare_scriptable__"


@dataclass(eq=False, kw_only=True)
class Sharded:
    """The sharding of a module.

    Attributes:
        plan: the plan in force, or the last one that was.
        mesh: the mesh that the module is sharded over.
        groups: the modules that own an FSDP group, by name; the root is last, as "".
        beside: groups of the root's parameters in other dtypes, unsharded when the root is.
        owners: the FSDP group of each parameter by name, unless that is the root.
        replicated: names of the parameters that FSDP ignores, whose gradients are averaged over all processes.
        layouts: layout, class and attributes that parameters had before they were sharded, by name.
        synchronize: whether the next backward reduces gradients.
        agreement: the agreement of data-parallel ranks on collectives; None if no other rank computes other samples.
        order: the comparison of the modules that tensor-parallel ranks run; None if there are no such ranks.
        stepping: whether a step runs.
        awaits_backward: whether Lightning is to run the backward of a step that has run.
        in_graph: groups whose module has run in the step and whose backward is still to come.
        in_backward: whether a backward runs that was announced, as `manual_backward` announces its own inside a step.
        whole: whether the module has full parameters in place of shards, for a block of code.
        hooks: hooks registered with submodules.
        undo: undoes the other changes.
        before_gather: called in a step, outside of its backward, before a block is unsharded.
        on_parts: runs a step if tensor parallelism shards parameters outside of blocks; else None.
        writes: watches the parameters of the groups.
        average: averages gradients that are set by hand.
    """

    plan: Plan
    mesh: DeviceMesh
    groups: dict[str, FSDPModule] = field(default_factory=dict)
    beside: list[FSDPModule] = field(default_factory=list)
    owners: dict[str, FSDPModule] = field(default_factory=dict)
    replicated: list[str] = field(default_factory=list)
    layouts: Mapping[str, Before] = field(default_factory=dict)
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
        """Return the groups of blocks and wrapped modules, the root's, and those beside it."""
        return [*self.groups.values(), *self.beside]

    def meet(self, *which: int, point: int = COLLECTIVE) -> None:
        """Wait, in a step or its backward, until all ranks are about to enter a collective.

        Args:
            which: numbers that distinguish it from others of its kind.
            point: COLLECTIVE or LOOK_UP.
        """
        if self.agreement is not None:
            self.agreement.meet(*which, point=point)


def sharded_state(module: nn.Module) -> Sharded | None:
    """Return the sharding of `module`; None if it is not sharded."""
    return vars(module).get(STATE)


def gathering_attributes() -> tuple[str, ...]:
    """Return the names of the attributes that a module has while it is sharded."""
    return STATE, STEP, SCRIPTED


def set_plan(state: Sharded, plan: Plan) -> None:
    """Unshard from now on as `plan` says, which shards the module as the plan before."""
    for name, group in state.groups.items():
        if name:
            group.set_reshard_after_forward(plan.reshard_after_forward, recurse=False)
    state.plan = plan


def forget_order(state: Sharded) -> None:
    """Discard the order of collectives in the steps so far, of which the last may have ended halfway."""
    for watching in (state.agreement, state.order):
        if watching is not None:
            watching.forget()


def meet(module: nn.Module, *which: int, point: int = COLLECTIVE) -> None:
    """Call `Sharded.meet` of `module`, if it is sharded.

    Args:
        module: the root.
        *which: as for `Sharded.meet`.
        point: as for `Sharded.meet`.
    """
    state = sharded_state(module)
    if state is not None:
        state.meet(*which, point=point)


def note_read(module: nn.Module, name: str, shards: Sequence[DTensor]) -> None:
    """Record that this rank reads sharded tensors; the ranks compare their reads where they meet next.

    Args:
        module: the root.
        name: a name that identifies the tensors.
        shards: the tensors.
    """
    state = sharded_state(module)
    if state is None or state.agreement is None:
        return
    # Ranks that read tensors which only tensor parallelism shards run the same modules.
    tensor_parallel = tensor_mesh(state.mesh)
    if tensor_parallel is None or not any(shard.device_mesh == tensor_parallel for shard in shards):
        state.agreement.note_read(name)


def reshard(module: nn.Module) -> None:
    """Free the unsharded parameters of `module` after their shards changed, or when no step follows."""
    state = sharded_state(module)
    if state is None:
        return
    for group in state.every_group():
        group.set_reshard_after_backward(True, recurse=False)
        group.reshard()
