"""LargeScaleStrategy: a Plan carried out in the Trainer's life cycle."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torchmetrics import Metric
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of, check_callbacks, copies_of, shows_summary
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.usage import HeapTrimmer
from lightning_largescale.launch import check_start_method, configure_launcher
from lightning_largescale.looking import LookingStrategy
from lightning_largescale.parallel.alike import equal_random_state
from lightning_largescale.parallel.compile import check_compile, compile_blocks
from lightning_largescale.parallel.copies import average_shards, equal_copies, find_copies, shard_copies
from lightning_largescale.parallel.gather import reshard, sharded_state
from lightning_largescale.parallel.heap import HeapWatch
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.materialize import check_equal_structure, equal_weights
from lightning_largescale.parallel.mesh import build_mesh, data_group, tensor_mesh, warn_of_distance
from lightning_largescale.parallel.optimizer import AdaptedOptimizer
from lightning_largescale.parallel.recompute import apply_recompute, remove_recompute
from lightning_largescale.parallel.replicate import Replica
from lightning_largescale.parallel.shard import adapt, shard_module
from lightning_largescale.parallel.tensor import compute_divided, compute_plainly
from lightning_largescale.parallel.user_styles import apply_styles, check_styles
from lightning_largescale.plan import Plan, PlanError
from lightning_largescale.precision import asked_precision, cast_type, convert_module, plugin_for
from lightning_largescale.record import record_plan
from lightning_largescale.tuning import finders_search_together
from lightning_largescale.workload.divisions import check_division, division_words, share_divided
from lightning_largescale.workload.model import Divided
from lightning_largescale.workload.parts import Part

# Of the matrices of blocks: a plan that divides as many is not asked whether another would divide more.
_ENOUGH = 0.9


class LargeScaleStrategy(LookingStrategy):
    """Trains a LightningModule as a plan says; the module's code, names and state_dict keys stay as they are.

    Args:
        plan: a Plan, a mapping of its fields, the path of a plan's JSON, or a function of the hardware that returns a
            Plan, asked when the trainer sets the strategy up.
        start_method: how ranks that the environment did not start come to be: "popen" runs the script again, "fork" and
            "spawn" start them from this process; None chooses.
        process_group_backend: torch.distributed's name; None takes the device's default.
        timeout: how long a collective may wait for the other ranks.
        compile: every repeated block is compiled by torch.compile, with these arguments where they are given.
        sample_batch: a batch to look at the step with, in place of one from the trainer's own loader.
        tensor_parallel_plan: torch's styles by names of modules, * standing for any part of a name, in place of what is
            found; a method `tensor_parallel_plan` of the module may return the same.

    Attributes:
        plan: the Plan in force; `Plan()` until a function has been asked.

    Raises:
        PlanError: the plan is not accepted; at setup, it does not fit the processes, the module, or the Trainer.
    """

    _watch: HeapWatch | None = None
    # By how many ranks that share their samples a sampler was last told to divide; 0 where it was not told.
    _told_samples_among = 0
    # Attributes that the parent of forked ranks is told.
    decided_at_setup: tuple[str, ...] = ("plan",)

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
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self._sample_batch = sample_batch
        self._styles = tensor_parallel_plan
        check_start_method(start_method)
        check_compile(compile)
        self._compile = compile
        self._planner = plan if callable(plan) else None
        self.plan = Plan() if callable(plan) else Plan.of(plan)
        self._start_method = start_method
        self._converted_by: Precision | None = None

    # Setup: the order of techniques

    @override
    def _configure_launcher(self) -> None:
        if self._planner is None and self._fixed:
            self.plan.check_world_size(self.num_nodes * self.num_processes)
        self._launcher = configure_launcher(self, self._start_method)

    @override
    def setup_environment(self) -> None:
        """Connect the ranks; a plan that was given has its precision from here on: `configure_model` builds in it."""
        super().setup_environment()
        # Refused before it converts anything, if it is to be refused.
        asked_precision(self.precision_plugin)
        if self._planner is None and self._fixed:
            self._use_precision(self.plan)

    @override
    def setup(self, trainer: Trainer) -> None:
        """Decide the plan and apply it to the module: precision, recomputation, compilation, sharding or replication,
        optimizers.

        Raises:
            PlanError: the plan does not fit the number of processes, the module, or what was given to the Trainer.
        """
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module, fitting = self._module(), trainer.state.fn == TrainerFn.FITTING
        plan = self.plan = self._decide(trainer)
        plan.check_world_size(self.world_size)
        check_callbacks(callbacks_of(trainer), plan)
        self._adapt(module, plan)
        self._use_precision(plan)
        self._convert(module)
        warn_of_distance(plan, self.num_processes)
        self._shard_tables(module, plan)
        if plan.tp > 1 and self._compile is not False:
            raise PlanError(f"compile={self._compile!r} cannot be combined with tp={plan.tp}; leave one of them out.")
        mesh = None if sharded_state(module) else build_mesh(plan, self.root_device.type)
        divided = self._divided(trainer, plan) if mesh is not None else {}
        if fitting and self._layer_sync is not None and sharded_state(module) is None:
            self.model = self._layer_sync.apply(module)
            if not plan.shards:
                # A sharded module keeps its layers: others would not be known to what gathers their parameters.
                self._undo.callback(self._layer_sync.revert, module)
        self._trim_heap = HeapTrimmer() if self._heap_is("trimmed", "mapped") else None
        on_parts = None
        if mesh is not None and (among := tensor_mesh(mesh)) is not None:
            on_parts = compute_divided(
                module, divided, among, share_sequence=plan.sequence_parallel, wraps=plan.wrapped_modules
            )
            self._undo.callback(self._compute_plainly, module)
        apply_recompute(module, plan)
        self._undo.callback(remove_recompute, module)
        if self._compile is not False:
            options = {} if self._compile is True else self._compile
            self._undo.callback(compile_blocks(module, options))
        if self._heap_is("watched"):
            self._watch_heap()
        if plan.shards:
            if mesh is not None:
                self._divide(module, mesh, {name: found.parts for name, found in divided.items()}, on_parts)
            self._join(trainer, module)
        else:
            self._place(trainer, module, plan, fitting=fitting)
        if self.has_peers:
            compat.flag_sigterm_only(trainer)
            self._undo.enter_context(finders_search_together(self, trainer))
        if fitting:
            self._known = KnownParameters(module, plan) if plan.world_size > 1 else None
            self.setup_optimizers(trainer)
            self._record(trainer)
        self.setup_precision_plugin()

    def _heap_is(self, *ways: str) -> bool:
        """Whether one of these is what is done about the holes in this process's heap."""
        return self.root_device.type == "cpu" and self.plan.heap in ways

    def _watch_heap(self, limit_bytes: int = 0) -> None:
        """Until teardown, or the next watch, give holes back above that limit."""
        if self._watch is None:
            self._undo.callback(self._watch_no_longer)
        else:
            self._watch.stop()
        self._watch = HeapWatch(limit_bytes)
        self._watch.start()

    def _watch_no_longer(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._watch = None

    def _record(self, trainer: Trainer) -> None:
        """Leave the plan with the trainer's loggers."""
        record_plan(trainer, self.plan)

    def _convert(self, module: LightningModule) -> None:
        """Make the module's parameters what the precision plugin in use makes of them, once."""
        if sharded_state(module) is None and self._converted_by is not self.precision_plugin:
            convert_module(self.precision_plugin, module)
            self._converted_by = self.precision_plugin

    def _decide(self, trainer: Trainer) -> Plan:
        """The plan to carry out; called on every rank once the module is built, before anything is changed."""
        if self._planner is None:
            return self.plan
        plan = self._planner(self._hardware())
        # A strategy named by a string says nothing of precision, so the Trainer's holds.
        return dataclasses.replace(plan, precision=asked_precision(self.precision_plugin) or plan.precision)

    def _hardware(self) -> Hardware:
        """What this rank finds, for the processes of the Trainer."""
        return Hardware.detect(
            accelerator=self.root_device.type,
            environment=self.cluster_environment,
            ranks_per_node=self.num_processes,
            nodes=self.num_nodes,
        )

    @property
    def _fixed(self) -> bool:
        """Whether the plan was given, and is not decided at setup."""
        return type(self)._decide is LargeScaleStrategy._decide

    def _use_precision(self, plan: Plan) -> None:
        """Put the plan's precision plugin in the place of the Trainer's until teardown."""
        given = self.precision_plugin
        plugin = plugin_for(plan, given, self.root_device.type)
        if plugin is not given:
            self.precision_plugin = plugin
            self._undo.callback(self._give_back_precision, given)

    def _give_back_precision(self, plugin: Precision) -> None:
        self.precision_plugin = plugin

    def _adapt(self, module: LightningModule, plan: Plan) -> None:
        """Make a module whole that an earlier plan divided, unless `plan` divides it alike."""
        state = sharded_state(module)
        if state is None or adapt(module, plan):
            return
        if (ranks := state.plan.world_size) != self.world_size:
            raise PlanError(
                f"{type(module).__name__.removeprefix('FSDP')} is divided among {ranks} processes and this Trainer has"
                f" {self.world_size}; first call `trainer.strategy.make_whole()` of the other Trainer on all ranks."
            )
        self.make_whole()

    def _user_styles(self) -> Mapping[str, ParallelStyle]:
        """How the user wants the module divided by tensor parallelism; empty where that is for us to find."""
        module = self._module()
        own = getattr(module, "tensor_parallel_plan", None)
        styles = self._styles or (own() if callable(own) else None) or {}
        check_styles(module, styles)
        return styles

    def _divided(self, trainer: Trainer, plan: Plan) -> Mapping[str, Divided]:
        """What tensor parallelism divides of each block, and of the rest: a collective."""
        if plan.tp == 1 or self._user_styles():
            return {}
        found = self._known_divisions(trainer).get(plan.tp)
        if found is not None:
            return found
        precision = asked_precision(self.precision_plugin) or plan.precision
        workload = self._traced(trainer, (precision,), (plan.tp,))
        if trainer.state.fn == TrainerFn.FITTING and share_divided(workload, plan.tp) < _ENOUGH:
            others = tuple(size for size in range(2, 2 * plan.tp + 1) if size != plan.tp)
            check_division(workload, self._traced(trainer, (precision,), others), plan.tp)
        if shows_summary(trainer):
            rank_zero_info(f"lightning_largescale: tp={plan.tp}, {division_words(workload, plan.tp)}")
        return workload.divisions.get(plan.tp, {})

    @staticmethod
    def _compute_plainly(module: LightningModule) -> None:
        """Take back what a setup that failed has begun; a module that is divided computes on parts."""
        if sharded_state(module) is None:
            compute_plainly(module)

    def _divide(
        self,
        module: LightningModule,
        mesh: DeviceMesh,
        parts: Mapping[str, Mapping[str, Part]],
        on_parts: Callable[[Callable[[], Any]], Any] | None,
    ) -> None:
        check_equal_structure(module)
        if (among := tensor_mesh(mesh)) is not None and (styles := self._user_styles()):
            apply_styles(module, styles, among, self.root_device)
        cast = cast_type(self.precision_plugin)
        shard_module(module, self.plan, mesh, self.root_device, gather_type=cast, parts=parts, on_parts=on_parts)

    def _join(self, trainer: Trainer, module: LightningModule) -> None:
        """Make what surrounds a divided module ready for it."""
        callbacks = callbacks_of(trainer)
        shard_copies(find_copies(callbacks, module), module)
        average_shards(callbacks)
        # Parameters that are gathered in inference mode cannot be used in training after it.
        fit_validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fit_validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            self._undo.callback(setattr, loop, "inference_mode", loop.inference_mode)
            loop.inference_mode = False
        state = sharded_state(module)
        assert state is not None
        self._tensor_mesh, self._compared = tensor_mesh(state.mesh), frozenset()
        if self._tensor_mesh is not None:
            equal_random_state(self._tensor_mesh, self.root_device, self.global_rank // self.plan.tp)
            self._count_samples_once(module, state.mesh)

    def _place(self, trainer: Trainer, module: LightningModule, plan: Plan, *, fitting: bool) -> None:
        self.model_to_device()
        if plan.dp_replicate > 1:
            check_equal_structure(module)
            equal_weights([*module.parameters(), *module.buffers()])
            equal_copies(copies_of(module, callbacks_of(trainer)), self.root_device)
            self._replica = Replica(module, self.root_device) if fitting else None

    @override
    def model_to_device(self) -> None:
        """Move the whole module to this rank's device."""
        self._module().to(self.root_device)

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Where `configure_model` builds: in DRAM, since the whole model need not fit the device."""
        with self.precision_plugin.tensor_init_context():
            yield

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Arguments of a DistributedSampler: the ranks of tensor parallelism compute the same samples."""
        every = super().distributed_sampler_kwargs
        self._told_samples_among = self.plan.tp
        return {name: number // self.plan.tp for name, number in every.items()}

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """`tensor` reduced over all ranks; a sum counts what ranks compute of the same samples once."""
        result = super().reduce(tensor, group, reduce_op)
        sums = reduce_op in (ReduceOp.SUM, "sum", "SUM")
        if self.plan.tp == 1 or group is not None or not sums or not isinstance(result, Tensor):
            return result
        return result / self.plan.tp if result.is_floating_point() else result // self.plan.tp

    def _count_samples_once(self, module: LightningModule, mesh: DeviceMesh) -> None:
        """Let the metrics of `module` sum over ranks that see other samples."""
        group = data_group(mesh)
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.process_group is None:
                self._undo.callback(setattr, metric, "process_group", None)
                metric.process_group = group

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create the optimizers over the parameters as they are now.

        Raises:
            PlanError: one holds other parameters than the module's, or cannot step on shards.
        """
        self._reset_optimizers_and_schedulers()
        super().setup_optimizers(trainer)
        known = self._known
        # Where a module has no optimizer Lightning's stands in, which has nothing to step.
        optimizers = [optimizer for optimizer in self.optimizers if optimizer.param_groups]
        self._adapted = [] if known is None else [AdaptedOptimizer(optimizer, known) for optimizer in optimizers]
        for adapted in self._adapted:
            self._undo.callback(adapted.undo)

    @override
    def teardown(self) -> None:
        """Leave the module as it was, but for its weights; what is sharded stays sharded, on its device."""
        self._uneven = None
        self._replica = None
        self._known = None
        self._tensor_mesh = None
        self._converted_by = None
        self.precision_plugin.teardown()
        self._undo.close()
        module = self.lightning_module
        if self.root_device.type != "cpu" and (module is None or sharded_state(module) is None):
            super().teardown()
            return
        if module is not None:
            reshard(module)
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


# The Trainer takes torch.compile(module) only with strategies that are this one, DDPStrategy or FSDPStrategy, and asks
# for this one nowhere else.
SingleDeviceStrategy.register(LargeScaleStrategy)
