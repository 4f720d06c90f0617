"""Run: one module under one plan in one Trainer, with everything that techniques know of one another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.folder import nvme_folder
from lightning_largescale.offload.offloaded_parameters import bring_back
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.places import Places
from lightning_largescale.offload.store import Store
from lightning_largescale.parallel.adapted_optimizer import AdaptedOptimizer
from lightning_largescale.parallel.embedding import row_sharded
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.mesh import build_mesh, use_mesh
from lightning_largescale.parallel.shard import adapt
from lightning_largescale.parallel.sharded import Sharded, sharded_state
from lightning_largescale.plan import Plan
from lightning_largescale.processes import Processes
from lightning_largescale.requeue import Requeue
from lightning_largescale.step_tracer import StepTracer
from lightning_largescale.workload.parts import Part


@dataclass(eq=False, kw_only=True)
class Run:
    """One module under one plan in one Trainer.

    Attributes:
        strategy: Lightning's strategy that carries out the plan.
        trainer: the Trainer.
        module: the module to run.
        plan: the plan in force.
        processes: the ranks of the run.
        tracer: traces the step that is about to run.
        hardware: detects this rank's hardware.
        compile: whether to compile blocks, or the arguments to compile them with.
        layer_sync: Lightning's plugin that replaces batch norms; None if the Trainer does not synchronize them.
        clipping: the context of code that reads gradients between backward and the optimizer's own step.
        exits: callbacks that teardown calls in reverse order.
        shards: the tensor-parallel shards of parameters, by block and by name in the block; those outside of blocks are
            under the block "".
        on_shards: runs a step where tensor parallelism shards parameters outside of blocks.
        store: the store on the disk of the nvme tier; None if nothing is offloaded to it.
        styles: the user's parallel styles by module names.
        sharding: the sharding of the module, also while it is begun; None if it is not sharded.
        released: the block name of each parameter that is updated in backward.
        unshard: replaces the module's shards with full parameters, which it returns by shard: a collective.
        end_steps: called after the last step of an evaluation.
        places: where parameters and gradients are that are not on the device.
        copied: with a CUDA device, the blocks whose shards are in DRAM or on disk.
        known: the parameters that the plan was applied to; None if any may be added.
        adapted: the optimizers that step on shards.
        paged: the optimizers that step page by page.
        requeue: handles the cluster's signal; None if no cluster requeues the job.
    """

    strategy: ParallelStrategy
    trainer: Trainer
    module: LightningModule
    plan: Plan
    processes: Processes
    tracer: StepTracer
    hardware: Callable[[], Hardware]
    compile: bool | Mapping[str, Any]
    styles: Mapping[str, ParallelStyle] | None
    layer_sync: LayerSync | None
    clipping: Toggled
    unshard: Callable[[], Mapping[Tensor, nn.Parameter]]
    end_steps: Callable[[], None]
    exits: contextlib.ExitStack
    sharding: Sharded | None = None
    shards: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)
    on_shards: Callable[[Callable[[], Any]], Any] | None = None
    store: Store | None = None
    released: Mapping[Tensor, str] = field(default_factory=dict)
    places: Places = field(default_factory=Places)
    copied: Collection[nn.Module] = ()
    known: KnownParameters | None = None
    adapted: Sequence[AdaptedOptimizer] = ()
    paged: Sequence[PagedOptimizer] = ()
    requeue: Requeue | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.strategy.root_device

    @property
    def has_peers(self) -> bool:
        """Return whether there are other ranks."""
        return self.processes.has_peers

    @property
    def fits(self) -> bool:
        """Return whether the run trains the module."""
        return self.trainer.state.fn == TrainerFn.FITTING

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """The mesh that the module is or will be sharded over; None if the plan gathers nothing.

        A collective, the first time; read it after row-sharded tables are in place.
        """
        state = sharded_state(self.module)
        if state is None:
            return build_mesh(self.plan, self.device.type)
        use_mesh(state.mesh)
        return state.mesh

    @property
    def is_sharded(self) -> bool:
        """Return whether the module has sharded parameters or row-sharded embedding tables."""
        return sharded_state(self.module) is not None or row_sharded(self.module) is not None

    @property
    def in_pages(self) -> bool:
        """Return whether optimizers step page by page."""
        plan = self.plan
        return bool(plan.offload_optimizer or plan.offload_parameters or plan.release_gradients)

    @cached_property
    def buffers(self) -> PageBuffers:
        """Memory of the pages of the optimizers' step."""
        return PageBuffers(pinned=self.device.type == "cuda")

    def open_store(self) -> None:
        """Open the store on the disk of the nvme tier, once.

        Raises:
            PlanError: there is no place on disk.
        """
        if self.store is None:
            self.processes.connect_alone()
            disks = self.hardware().disks if self.plan.nvme_path is None else ()
            self.store = Store(nvme_folder(self.plan, disks))
            self.exits.callback(self.store.close)

    def check_dense(self) -> None:
        """Raise PlanError if an embedding of the module has sparse gradients."""
        for name, part in self.module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
                raise PlanError(
                    f"the {type(part).__name__} {name!r} has sparse=True, and what is offloaded or released takes no"
                    " sparse gradients; make it without sparse=True, or leave out offload_optimizer, offload_parameters"
                    " and release_gradients."
                )


def undo_earlier(
    module: LightningModule,
    plan: Plan,
    device: torch.device,
    world_size: int,
    unshard: Callable[[], Mapping[Tensor, nn.Parameter]],
) -> None:
    """Unshard a module that an earlier plan sharded, unless it can be adapted to `plan`; bring it back from disk.

    Args:
        module: the module.
        plan: the plan to apply.
        device: this rank's device.
        world_size: the number of processes.
        unshard: replaces the module's shards with full parameters: a collective.

    Raises:
        PlanError: the module is sharded over another number of processes.
    """
    state = sharded_state(module)
    if state is not None and not adapt(module, plan, device):
        if (ranks := state.plan.world_size) != world_size:
            raise PlanError(
                f"{type(module).__name__.removeprefix('FSDP')} is divided among {ranks} processes and this Trainer has"
                f" {world_size}; first call `trainer.strategy.make_whole()` of the other Trainer on all ranks."
            )
        unshard()
    if plan.offload_parameters != "nvme":
        state = sharded_state(module)
        groups: dict[str, Any] = {} if state is None else {**state.groups}
        bring_back(module, groups)


class Toggled:
    """A context that is entered and left by hand within an optimizer's step, and left at its end in any case.

    Args:
        context: returns the context.
    """

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._context = context
        # None outside of an optimizer's step.
        self._of_step: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def step(self) -> Generator[None, None, None]:
        """Context of an optimizer's step, within which `enter` and `leave` have an effect; steps may be nested."""
        before = self._of_step
        with contextlib.ExitStack() as self._of_step:
            try:
                yield
            finally:
                self._of_step = before

    def enter(self) -> None:
        """Enter the context until `leave` or the end of the step."""
        if self._of_step is not None:
            self._of_step.enter_context(self._context())

    def leave(self) -> None:
        """Leave the context if it was entered."""
        if self._of_step is not None:
            self._of_step.close()
