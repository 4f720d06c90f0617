"""LargeScaleStrategy: execution of a Plan in the Trainer's life cycle."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale import comm, compat
from lightning_largescale.callbacks import callbacks_of, check_callbacks
from lightning_largescale.checkpoint import warn_of_left_out
from lightning_largescale.checkpoint.directory import replacing_directory
from lightning_largescale.checkpoint.session import ModuleCheckpoints
from lightning_largescale.checkpoint.weights import Weights, check_weights
from lightning_largescale.hardware import Hardware
from lightning_largescale.launch import check_start_method, configure_launcher
from lightning_largescale.optimizers.closure import evaluate_first
from lightning_largescale.parallel.compile import check_compile
from lightning_largescale.parallel.copies import find_copies, whole_copies
from lightning_largescale.parallel.embedding import make_tables_whole, whole_tables
from lightning_largescale.parallel.full_params import make_whole, whole_parameters
from lightning_largescale.parallel.mesh import warn_of_distance
from lightning_largescale.parallel.sharded import meet, reshard, sharded_state
from lightning_largescale.parallel.uneven import equal_batches
from lightning_largescale.plan import Plan
from lightning_largescale.precision import asked_precision, is_own, plugin_for
from lightning_largescale.processes import Processes, check_accelerator
from lightning_largescale.record import record_plan
from lightning_largescale.run import Run, Toggled, undo_earlier
from lightning_largescale.step_tracer import StepTracer
from lightning_largescale.technique import Technique, Techniques
from lightning_largescale.techniques.activation_checkpoint.apply import ActivationCheckpoint
from lightning_largescale.techniques.activation_offload.apply import ActivationOffload
from lightning_largescale.techniques.compile.apply import CompileBlocks
from lightning_largescale.techniques.fully_shard.apply import FullyShard
from lightning_largescale.techniques.fully_shard.local_step import LocalOptimizerStep
from lightning_largescale.techniques.fully_shard.module_copies import ModuleCopies
from lightning_largescale.techniques.fully_shard.sharded_reads import ShardedReads
from lightning_largescale.techniques.gradient_release.apply import GradientRelease
from lightning_largescale.techniques.malloc_policy.apply import MallocPolicy
from lightning_largescale.techniques.paged_optimizer.apply import PagedOptimizerStep
from lightning_largescale.techniques.parameter_offload.apply import ParameterOffload
from lightning_largescale.techniques.replicate.apply import Replicate
from lightning_largescale.techniques.requeue.apply import RequeueOnSignal
from lightning_largescale.techniques.row_wise_embedding.apply import RowWiseEmbedding
from lightning_largescale.techniques.synced_layers.apply import SyncedLayers
from lightning_largescale.techniques.tensor_parallel.apply import TensorParallel
from lightning_largescale.techniques.uneven_inputs.apply import UnevenInputs
from lightning_largescale.tuning import finders_search_together
from lightning_largescale.values import ModuleValues
from lightning_largescale.workload.kinds import check_tensors

_Value = TypeVar("_Value")

# The techniques in the order in which they are set up; they are closed in reverse order.
TECHNIQUES: tuple[type[Technique], ...] = (
    RowWiseEmbedding,
    SyncedLayers,
    TensorParallel,
    ActivationCheckpoint,
    CompileBlocks,
    ActivationOffload,
    MallocPolicy,
    RequeueOnSignal,
    UnevenInputs,
    ShardedReads,
    FullyShard,
    Replicate,
    ParameterOffload,
    ModuleCopies,
    LocalOptimizerStep,
    PagedOptimizerStep,
    GradientRelease,
)


class LargeScaleStrategy(ParallelStrategy):
    """Strategy that trains a LightningModule under a plan; the module's code, names and state_dict keys do not change.

    There is one process per device, connected by torch.distributed; a single process has no process group.

    Args:
        plan: a Plan, a mapping of its fields, the path of a plan's JSON, or a function of the hardware that returns a
            Plan and is called at setup.
        start_method: the method to start ranks that the environment did not start: "popen" runs the script again,
            "fork" and "spawn" start them from this process; None selects one.
        process_group_backend: torch.distributed's name of the backend; None selects the device's default.
        timeout: the time that a collective may wait for the other ranks.
        compile: whether to compile every repeated block with torch.compile, or the arguments to compile them with.
        sample_batch: a batch to trace the step with, in place of one from the trainer's loader.
        tensor_parallel_plan: torch's parallel styles by module names, with * for any part of a name, in place of those
            that are found; a method `tensor_parallel_plan` of the module may return the same.
        save_full: whether checkpoints of a sharded module are single files of full tensors, assembled on rank 0, in
            place of directories to which each rank writes its shards; both can be loaded under any plan.
        weights: the module's weights, of which each rank reads its shards at setup: a safetensors or torch file, an
            index of several, or a folder with them; or such paths by submodule names, as in {"model": path}.

    Attributes:
        plan: the current plan; `Plan()` until a function of the hardware has returned one.

    Raises:
        PlanError: the plan is not valid; at setup, it does not fit the processes, the module, or the Trainer.
    """

    # Attributes that forked ranks send to their parent.
    decided_at_setup: tuple[str, ...] = ("plan",)
    # Whether setup decides the plan by itself.
    _searches_plan = False
    # True during a batch size search.
    searching = False
    # The tp size for which sampler arguments were last returned; 0 if they were not.
    _told_samples_among = 0

    def __init__(
        self,
        plan: Plan | Mapping[str, Any] | str | Path | Callable[[Hardware], Plan],
        *,
        start_method: Literal["popen", "fork", "spawn"] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        compile: bool | Mapping[str, Any] = False,
        sample_batch: Any = None,
        tensor_parallel_plan: Mapping[str, ParallelStyle] | None = None,
        save_full: bool = False,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        check_start_method(start_method)
        check_compile(compile)
        check_weights(weights)
        self._start_method, self._compile, self._styles = start_method, compile, tensor_parallel_plan
        self._planner = plan if callable(plan) else None
        self.plan = Plan() if callable(plan) else Plan.of(plan)
        # Callbacks with which teardown reverts changes.
        self._exits = contextlib.ExitStack()
        self._processes = Processes(self, process_group_backend, timeout, self._exits)
        self._tracer = StepTracer(self, sample_batch)
        self._values = ModuleValues(self, self._processes, weights, may_shard=self._may_shard)
        self._checkpoints = ModuleCheckpoints(self, save_full=save_full, may_shard=self._may_shard)
        self._techniques = Techniques()
        self._run: Run | None = None

    # Processes

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The trainer's accelerator: CPU or CUDA."""
        return super().accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        check_accelerator(accelerator, type(self).__name__)
        ParallelStrategy.accelerator.fset(self, accelerator)  # type: ignore[attr-defined]

    @property
    @override
    def local_rank(self) -> int:
        """Rank of this process on its node.

        It is 0 for a Trainer with one device, even if the process was launched with others: a script that trained on
        several devices may go on with each process by itself.
        """
        return super().local_rank if self.has_peers else 0

    @property
    @override
    def global_rank(self) -> int:
        """Rank of this process among all processes."""
        return super().global_rank if self.has_peers else 0

    @property
    @override
    def node_rank(self) -> int:
        """Rank of this process's node; the environment is queried only if the run is distributed."""
        return super().node_rank if self.is_distributed else 0

    @property
    @override
    def world_size(self) -> int:
        """Number of processes."""
        return self._processes.world_size

    @property
    @override
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self._processes.device(self.local_rank)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self._processes.num_nodes

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        self._processes.num_nodes = number

    @property
    def num_processes(self) -> int:
        """Number of ranks on this node; before the ranks are connected, the number of devices of the Trainer."""
        return self._processes.per_node

    @property
    def is_distributed(self) -> bool:
        """Return whether loaders are sharded among ranks; False when Lightning's batch size finder asks."""
        return self.has_peers and not compat.asked_by_batch_size_finder()

    @property
    def has_peers(self) -> bool:
        """Return whether there are other ranks."""
        return self._processes.has_peers

    @property
    def process_group_backend(self) -> str | None:
        """torch.distributed's name of the backend."""
        return self._processes.backend

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Arguments of a DistributedSampler: the ranks of tensor parallelism compute the same samples."""
        self._told_samples_among = self.plan.tp
        return {"num_replicas": self.world_size // self.plan.tp, "rank": self.global_rank // self.plan.tp}

    def set_world_ranks(self) -> None:
        """Set the rank and world size of the cluster environment, and adopt its world size if it reports another."""
        self._processes.set_world_ranks()

    @override
    def _configure_launcher(self) -> None:
        if self._plan_is_given:
            self.plan.check_world_size(self.world_size)
        self._launcher = configure_launcher(self, self._start_method)

    @override
    def setup_environment(self) -> None:
        """Connect the ranks and, for a given plan, set its precision, in which `configure_model` builds."""
        super().setup_environment()
        self._processes.connect(sums_in_dram=not self._plan_is_given or self.plan.offload_parameters is not None)
        # Raises for a plugin that is not accepted before it converts anything.
        asked_precision(self.precision_plugin)
        if self._plan_is_given:
            self._use_precision(self.plan)

    def _meet_peers(self) -> None:
        """Wait, in a step whose ranks may run different modules, until all are about to enter a collective."""
        if self.lightning_module is not None:
            meet(self.lightning_module)

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank reaches the barrier."""
        self._meet_peers()
        if self._processes.are_connected:
            comm.barrier(self.root_device)

    @override
    def broadcast(self, obj: _Value, src: int = 0) -> _Value:
        """Return rank `src`'s `obj` on every rank."""
        if not self._processes.are_connected:
            return obj
        self._meet_peers()
        return comm.broadcast_object(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return every rank's `tensor`, stacked; in a single process, `tensor` itself."""
        self._meet_peers()
        return super().all_gather(tensor, group, sync_grads) if self.has_peers else tensor

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce `tensor` over all ranks; a sum counts samples that tensor-parallel ranks share once."""
        if not (self.has_peers and isinstance(tensor, Tensor)):
            return tensor
        self._meet_peers()
        result = compat.reduce_tensor(tensor, group, reduce_op)
        if self.plan.tp == 1 or group is not None or reduce_op not in (ReduceOp.SUM, "sum", "SUM"):
            return result
        return result / self.plan.tp if result.is_floating_point() else result // self.plan.tp

    # Setup

    @override
    def setup(self, trainer: Trainer) -> None:
        """Decide the plan, apply its techniques to the module, and create the optimizers.

        Raises:
            PlanError: the plan does not fit the number of processes, the module, or the Trainer's arguments.
        """
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._module()
        self.plan = self._decide(trainer)
        run = self._run = self._begin(trainer, module)
        self._techniques = Techniques(technique(run) for technique in TECHNIQUES if technique.wanted(run))
        self._techniques.each(Technique.check)
        self._use_precision(run.plan)
        self._values.convert()
        warn_of_distance(run.plan, self.num_processes)
        self._values.prepare()
        self._techniques.each(Technique.prepare)
        self._techniques.each(Technique.wrap)
        self._techniques.each(Technique.shard)
        self._values.make(partial(self._techniques.first, Technique.storage))
        self._techniques.each(Technique.ready)
        self._enter_run(run)
        if run.fits:
            self.setup_optimizers(trainer)
            self._record(trainer)
            if self._checkpoints.are_directories:
                warn_of_left_out(trainer, run.plan)
        self.setup_precision_plugin()

    def _begin(self, trainer: Trainer, module: LightningModule) -> Run:
        """Check the plan, undo an earlier one that differs, and return the run."""
        plan = self.plan
        plan.check_world_size(self.world_size)
        check_callbacks(callbacks_of(trainer), plan)
        undo_earlier(module, plan, self.root_device, self.world_size, self.make_whole)
        run = Run(
            strategy=self,
            trainer=trainer,
            module=module,
            plan=plan,
            processes=self._processes,
            tracer=self._tracer,
            hardware=self._hardware,
            compile=self._compile,
            styles=self._styles,
            layer_sync=compat.layer_sync(self),
            clipping=Toggled(lambda: self._techniques.all(Technique.clip)),
            unshard=self.make_whole,
            end_steps=lambda: self._techniques.each(Technique.end_steps),
            exits=self._exits,
        )
        if not run.is_sharded:
            check_tensors(module, plan)
        return run

    def _enter_run(self, run: Run) -> None:
        """Adapt the strategy and the Trainer to the techniques until teardown."""
        self._checkpoints.keeps_on_disk = run.store is not None
        self._checkpoints.state_memory = partial(self._techniques.first, Technique.state_memory)
        if run.is_sharded or (run.fits and run.has_peers):
            # Lightning's own method, which may be wrapped on its class, stays where gradients need no reduction.
            self.backward = self._backward  # type: ignore[method-assign]
            self._exits.callback(delattr, self, "backward")
        if run.is_sharded:
            self._exits.enter_context(compat.around_hooks(run.trainer, self._around_hook))
        if self.has_peers:
            compat.flag_sigterm_only(run.trainer)
        self._exits.enter_context(finders_search_together(self, run.trainer))

    def _record(self, trainer: Trainer) -> None:
        """Log the plan with the trainer's loggers."""
        record_plan(trainer, self.plan)

    def _decide(self, trainer: Trainer) -> Plan:
        """Return the plan to apply; called on every rank after the module is built and before it is changed."""
        if self._planner is None:
            return self.plan
        plan = self._planner(self._hardware())
        # A strategy named by a string sets no precision, so the Trainer's holds.
        return dataclasses.replace(plan, precision=asked_precision(self.precision_plugin) or plan.precision)

    def _hardware(self) -> Hardware:
        """Detect this rank's hardware, for the Trainer's number of processes."""
        return Hardware.detect(
            accelerator=self.root_device.type,
            environment=self.cluster_environment,
            ranks_per_node=self.num_processes,
            nodes=self.world_size // self.num_processes,
        )

    @property
    def _plan_is_given(self) -> bool:
        """Return whether the user gave a plan, so that it is known before setup."""
        return self._planner is None and not self._searches_plan

    def _may_shard(self) -> bool:
        """Return whether the plan shards the module or offloads its parameters, or may do so once it is decided."""
        if self.plan.offload_parameters is not None or self._searches_plan:
            return True
        return self.has_peers and (self.plan.shards or bool(self.plan.row_sharded_embeddings))

    def _use_precision(self, plan: Plan) -> None:
        """Replace the Trainer's precision plugin with the plan's until teardown."""
        given = self.precision_plugin
        plugin = plugin_for(plan, given, self.root_device.type)
        if plugin is not given:
            self.precision_plugin = plugin
            self._exits.callback(setattr, self, "precision_plugin", given)

    @override
    def model_to_device(self) -> None:
        """Move the full module to this rank's device."""
        self._module().to(self.root_device)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create the optimizers of the current parameters and adapt them to the techniques."""
        self.optimizers, self.lr_scheduler_configs = [], []
        super().setup_optimizers(trainer)
        # Lightning's placeholder for a missing optimizer has nothing to step.
        optimizers = [optimizer for optimizer in self.optimizers if optimizer.param_groups]
        self._techniques.each(Technique.optimizers, optimizers)
        if self._run is not None:
            self._checkpoints.adapted = self._run.adapted

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Context in which a module that may be sharded is built without values, which setup makes.

        Args:
            empty_init: The argument of `Trainer.init_module`. If true, the module is built without values there as
                well, for example since its weights are loaded next.
        """
        with self._values.init_context(empty_init):
            yield

    @override
    def teardown(self) -> None:
        """Restore the module except for its weights; a sharded module stays sharded, on its device."""
        self._values.close()
        self._checkpoints.close()
        techniques, self._techniques, self._run = self._techniques, Techniques(), None
        # Also after a technique that fails to close: Lightning calls this once more then.
        with self._exits:
            techniques.each_reversed(Technique.close)
            self.precision_plugin.teardown()
        module = self.lightning_module
        # A failed setup may leave a module on the meta device, which nothing can be moved from.
        whole = module is None or not (sharded_state(module) or any(one.is_meta for one in module.parameters()))
        if self.root_device.type != "cpu" and whole:
            super().teardown()
            return
        if module is not None:
            reshard(module)
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # Steps

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Return the loader that the techniques make of `dataloader`, equally long on all ranks in training.

        Lightning calls this before setup if the module asks for `estimated_stepping_batches` in its own `setup`.
        """
        loader = self._techniques.chain(Technique.dataloader, value=dataloader)
        equal = self.is_distributed and self._module().trainer.training
        return equal_batches(loader, self.root_device) if equal else loader

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step through the techniques."""
        return self._step("training_step", self.precision_plugin.train_step_context, args, kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's validation step through the techniques."""
        return self._step("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's test step through the techniques."""
        return self._step("test_step", self.precision_plugin.test_step_context, args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's predict step through the techniques."""
        return self._step("predict_step", self.precision_plugin.predict_step_context, args, kwargs)

    def _step(
        self,
        stage: str,
        precision: Callable[[], contextlib.AbstractContextManager[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._techniques.each(Technique.check_step, stage, args)
        step = partial(getattr(self._module(), stage), *args, **kwargs)
        step = self._techniques.chain(Technique.around_step, stage, value=step)
        with (
            self._techniques.all(Technique.user_code, in_step=True),
            precision(),
            self._techniques.all(Technique.step, stage),
        ):
            result = step()
        self._techniques.each(Technique.after_step, stage)
        return result

    @contextlib.contextmanager
    def _around_hook(self, name: str) -> Generator[None, None, None]:
        """Context of a hook of the module or of a callback."""
        module = self.lightning_module
        # Lightning's own hook only runs the step.
        if module is None or (name == "optimizer_step" and not is_overridden(name, module)):
            yield
            return
        with self._techniques.all(Technique.hook, name), self._techniques.all(Technique.user_code, in_step=False):
            yield

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare gradient reduction for the backward of `closure_loss`, also one that a manual step runs."""
        self._techniques.each(Technique.before_backward, closure_loss)

    def _backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run Lightning's sequence of a backward, with gradients reduced before the hooks that read them."""
        module, precision = self._module(), self.precision_plugin
        with self._techniques.all(Technique.backward):
            self.pre_backward(closure_loss)
            closure_loss = precision.pre_backward(closure_loss, module)
            precision.backward(closure_loss, module, optimizer, *args, **kwargs)
            self._techniques.each(Technique.reduce_gradients)
            closure_loss = precision.post_backward(closure_loss, module)
            self.post_backward(closure_loss)
        return closure_loss

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """End the backward that `pre_backward` began."""
        self._techniques.each(Technique.after_backward)

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Context in which backward accumulates gradients without reducing them, where that is possible."""
        with self._techniques.all(Technique.no_sync):
            yield

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the closure (forward and backward) and the optimizer's step."""
        run = self._run
        if run is None:
            # Without a setup, as in loops that are run by hand, no technique is at work.
            return super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._techniques.each(Technique.check_optimizer, optimizer)
        if not self._module().automatic_optimization:
            self._techniques.each(Technique.check_gradients, optimizer)
        with self._techniques.all(Technique.update) as runners, run.clipping.step():

            def evaluate() -> Any:
                run.clipping.leave()
                inner = closure
                for runner in filter(None, runners):
                    inner = partial(runner, inner)
                result = inner()
                self._techniques.each(Technique.check_gradients, optimizer)
                run.clipping.enter()
                return result

            # A plugin of the user's may do something before it evaluates the closure.
            own = is_own(self.precision_plugin)
            evaluated = evaluate if own else evaluate_first(optimizer, evaluate, paged=run.in_pages)
            result = super().optimizer_step(optimizer, evaluated, *args, **kwargs)
        self._techniques.each(Technique.after_update)
        return result

    def forget_step(self) -> None:
        """Reset all state of a step that ended halfway on all ranks, and drop its gradients."""
        self._techniques.each_reversed(Technique.abort_step)
        self._module().zero_grad()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Prepare the techniques for a batch."""
        super().on_train_batch_start(batch, batch_idx)
        self._techniques.each(Technique.batch_start, batch_idx)

    @override
    def on_train_end(self) -> None:
        """Let the techniques follow the last step."""
        self._techniques.each(Technique.train_end)

    @override
    def on_validation_start(self) -> None:
        """Prepare an evaluation in which ranks may have different numbers of batches."""
        self._techniques.each(Technique.start_evaluation, logged=True)

    @override
    def on_predict_start(self) -> None:
        """Prepare a prediction in which ranks may have different numbers of batches."""
        self._techniques.each(Technique.start_evaluation, logged=False)

    @override
    def on_validation_end(self) -> None:
        """Reshard the parameters that evaluation unsharded."""
        self._techniques.each(Technique.end_evaluation)

    on_test_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_search_end(self) -> None:
        """Hook called at the end of a batch size search."""

    # State

    @contextlib.contextmanager
    def full_parameters(self) -> Generator[None, None, None]:
        """Context in which the module's sharded or offloaded parameters are full plain tensors on its device.

        Entering and leaving it is a collective. It is for code that reads `parameters()` or `state_dict()`, or writes
        into them. Written values are kept and must be the same on all ranks. The full model must fit on the device
        beside this rank's shards. In `training_step` the parameters are read-only, and a loss may be computed from
        them; elsewhere they have no gradients.
        """
        with whole_tables(self._module()), whole_parameters(self._module(), self.root_device):
            yield

    def make_whole(self) -> Mapping[Tensor, Parameter]:
        """Replace the module's shards with full plain parameters on the CPU, equal on all ranks: a collective.

        Call it after `fit` under a sharded plan, for code that is not distributed. Optimizers no longer train the
        module. Copies of the module that callbacks keep are unsharded too.

        Returns:
            The full parameter that replaces each shard.
        """
        module = self._module()
        make_tables_whole(module)
        made = make_whole(module)
        whole_copies(find_copies(callbacks_of(module.trainer), module))
        return made

    def make_all(self) -> None:
        """Materialize the full module in this process if it was built without values."""
        self._values.make_all()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file or directory.

        In a batch size search, all ranks read rank 0's path, since each rank has made up its own. Tensors of a
        directory, and of a file if the module may be sharded, are read lazily and in part.

        Raises:
            PlanError: a directory is not a checkpoint, or a directory or file is incomplete.
        """
        path = self.broadcast(checkpoint_path) if self.searching else checkpoint_path
        checkpoint = self._checkpoints.read(path, weights_only)
        return super().load_checkpoint(path, weights_only) if checkpoint is None else checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's weights; if it has no values yet, defer loading until its shards are materialized."""
        if not self._values.defer_loading(checkpoint, strict=strict):
            super().load_model_state_dict(checkpoint, strict)

    def full_module_state(self) -> dict[str, Any]:
        """Return the module's `state_dict` with full tensors, only on rank 0 if it is sharded: a collective."""
        return self._checkpoints.full_module_state()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state for a checkpoint: shards, or full tensors on rank 0; a collective."""
        return self._checkpoints.module_state()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state for a checkpoint: a collective."""
        state = self._checkpoints.optimizer_state(optimizer)
        return super().optimizer_state(optimizer) if state is None else state

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer states in order, each rank its shards; surplus states or optimizers are skipped."""
        self._checkpoints.load_optimizer_states(checkpoint)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint: a directory to which each rank writes its shards, or a file; a collective."""
        file = self._checkpoints.save(checkpoint, filepath, storage_options)
        if file is not None:
            with replacing_directory(filepath) if self.is_global_zero else contextlib.nullcontext():
                super().save_checkpoint(file, filepath, storage_options)

    def _module(self) -> LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("the Trainer has not given the strategy its module yet")
        return self.lightning_module


# The Trainer accepts torch.compile(module) only with SingleDeviceStrategy, DDPStrategy or FSDPStrategy, and checks for
# SingleDeviceStrategy nowhere else.
SingleDeviceStrategy.register(LargeScaleStrategy)
