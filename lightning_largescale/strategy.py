"""LargeScaleStrategy: execution of a Plan in the Trainer's life cycle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of, check_callbacks, copies_of
from lightning_largescale.checkpoint import warn_of_left_out
from lightning_largescale.checkpoint.weights import Weights, check_weights
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.usage import HeapTrimmer
from lightning_largescale.launch import check_start_method, configure_launcher
from lightning_largescale.offload.activations import offload_activations
from lightning_largescale.offloading import OffloadingStrategy
from lightning_largescale.parallel.adapted_optimizer import AdaptedOptimizer
from lightning_largescale.parallel.alike import equal_random_state
from lightning_largescale.parallel.compile import check_compile, compile_blocks
from lightning_largescale.parallel.copies import average_shards, equal_copies, find_copies, shard_copies
from lightning_largescale.parallel.equal import check_equal_structure, equal_weights
from lightning_largescale.parallel.gather import reshard, sharded_state
from lightning_largescale.parallel.heap import HeapWatch
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.parallel.mesh import build_mesh, tensor_mesh, use_mesh, warn_of_distance
from lightning_largescale.parallel.recompute import apply_recompute, remove_recompute
from lightning_largescale.parallel.replicate import Replica
from lightning_largescale.parallel.shard import adapt, shard_module
from lightning_largescale.parallel.tensor import compute_divided
from lightning_largescale.parallel.user_styles import apply_styles
from lightning_largescale.plan import Plan
from lightning_largescale.precision import asked_precision, cast_type, convert_module, plugin_for
from lightning_largescale.record import record_plan
from lightning_largescale.tuning import finders_search_together
from lightning_largescale.workload.kinds import check_tensors
from lightning_largescale.workload.parts import Part


class LargeScaleStrategy(OffloadingStrategy):
    """Strategy that trains a LightningModule under a plan; the module's code, names and state_dict keys do not change.

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
        plan: the current Plan; `Plan()` until a function of the hardware has returned one.

    Raises:
        PlanError: the plan is not valid; at setup, it does not fit the processes, the module, or the Trainer.
    """

    _watch: HeapWatch | None = None
    # Attributes that forked ranks send to their parent.
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
        save_full: bool = False,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self._sample_batch = sample_batch
        self._styles, self._save_full, self._weights = tensor_parallel_plan, save_full, weights
        check_start_method(start_method)
        check_compile(compile)
        check_weights(weights)
        self._compile = compile
        self._planner = plan if callable(plan) else None
        self.plan = Plan() if callable(plan) else Plan.of(plan)
        self._start_method = start_method
        self._converted_by: Precision | None = None

    # Setup: the order of techniques

    @override
    def _configure_launcher(self) -> None:
        if self._planner is None and self._fixed:
            self.plan.check_world_size(self.world_size)
        self._launcher = configure_launcher(self, self._start_method)

    @override
    def setup_environment(self) -> None:
        """Connect the ranks and, for a given plan, set its precision, in which `configure_model` builds."""
        super().setup_environment()
        # Raises for a plugin that is not accepted before it converts anything.
        asked_precision(self.precision_plugin)
        if self._planner is None and self._fixed:
            self._use_precision(self.plan)

    @override
    def setup(self, trainer: Trainer) -> None:
        """Decide the plan and apply it: precision, recomputation, compilation, sharding or replication, optimizers.

        Raises:
            PlanError: the plan does not fit the number of processes, the module, or the Trainer's arguments.
        """
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module, fitting = self._module(), trainer.state.fn == TrainerFn.FITTING
        plan = self.plan = self._decide(trainer)
        plan.check_world_size(self.world_size)
        check_callbacks(callbacks_of(trainer), plan)
        self._adapt(module, plan)
        if not self._is_divided():
            check_tensors(module, plan)
        self._open_tiers(trainer, module, plan)
        self._use_precision(plan)
        self._convert(module)
        warn_of_distance(plan, self.num_processes)
        self._prepare_values()
        self._shard_tables(module, plan)
        if plan.tp > 1 and self._compile is not False:
            raise PlanError(f"compile={self._compile!r} cannot be combined with tp={plan.tp}; leave one of them out.")
        mesh = None
        if (state := sharded_state(module)) is None:
            mesh = build_mesh(plan, self.root_device.type)
        else:
            use_mesh(state.mesh)
        divided = self._divided(trainer, plan) if mesh is not None else {}
        if fitting and self._layer_sync is not None and sharded_state(module) is None:
            self.model = self._layer_sync.apply(module)
            if not plan.gathers:
                # A sharded module keeps its layers: FSDP2 would not know replaced ones.
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
        self._undo.callback(offload_activations(module, plan, self._store, self.root_device))
        if self._heap_is("watched"):
            self._watch_heap()
        if plan.gathers:
            if mesh is None:
                self._spill(sharded_state(module))
                self._make_values()
            else:
                self._divide(module, mesh, {name: found.parts for name, found in divided.items()}, on_parts)
            self._take_over(fitting=fitting)
            self._join(trainer, module)
        else:
            self._place(trainer, module, plan, fitting=fitting)
        self._adapt_backward()
        self._undo.enter_context(compat.around_hooks(trainer, self._around_hook))
        if self.has_peers:
            compat.flag_sigterm_only(trainer)
        self._undo.enter_context(finders_search_together(self, trainer))
        self._heed_requeue_signal(trainer)
        if fitting:
            self._known = KnownParameters(module, plan) if plan.world_size > 1 or plan.gathers else None
            self.setup_optimizers(trainer)
            self._record(trainer)
            if self._in_parts():
                warn_of_left_out(trainer, plan)
        self.setup_precision_plugin()

    def _heap_is(self, *ways: str) -> bool:
        """Return whether the device is the CPU and the plan's `heap` is one of `ways`."""
        return self.root_device.type == "cpu" and self.plan.heap in ways

    def _watch_heap(self, limit_bytes: int = 0) -> None:
        """Return free heap memory to the system above `limit_bytes`, until teardown or the next call."""
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
        """Log the plan with the trainer's loggers."""
        record_plan(trainer, self.plan)

    def _convert(self, module: LightningModule) -> None:
        """Convert the module's parameters with the current precision plugin, once per plugin."""
        if sharded_state(module) is None and self._converted_by is not self.precision_plugin:
            with self._recorded():
                convert_module(self.precision_plugin, module)
            self._converted_by = self.precision_plugin

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
    @override
    def _fixed(self) -> bool:
        """Return whether `_decide` is not overridden: the plan or its function was given by the user."""
        return type(self)._decide is LargeScaleStrategy._decide

    @property
    @override
    def _sums_in_dram(self) -> bool:
        return self._planner is not None or not self._fixed or self.plan.offload_parameters is not None

    def _use_precision(self, plan: Plan) -> None:
        """Replace the Trainer's precision plugin with the plan's until teardown."""
        given = self.precision_plugin
        plugin = plugin_for(plan, given, self.root_device.type)
        if plugin is not given:
            self.precision_plugin = plugin
            self._undo.callback(self._give_back_precision, given)

    def _give_back_precision(self, plugin: Precision) -> None:
        self.precision_plugin = plugin

    def _adapt(self, module: LightningModule, plan: Plan) -> None:
        """Unshard a module that an earlier plan sharded, unless it can be adapted to `plan`.

        Raises:
            PlanError: the module is sharded over another number of processes.
        """
        state = sharded_state(module)
        if state is None or adapt(module, plan, self.root_device):
            return
        if (ranks := state.plan.world_size) != self.world_size:
            raise PlanError(
                f"{type(module).__name__.removeprefix('FSDP')} is divided among {ranks} processes and this Trainer has"
                f" {self.world_size}; first call `trainer.strategy.make_whole()` of the other Trainer on all ranks."
            )
        self.make_whole()

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
        shard_module(
            module,
            self.plan,
            mesh,
            self.root_device,
            gather_type=cast,
            parts=parts,
            on_parts=on_parts,
            divided=self._spill,
            make=self._make_values,
        )

    def _join(self, trainer: Trainer, module: LightningModule) -> None:
        """Adapt callbacks, loops, random state and metrics to a sharded module."""
        callbacks = callbacks_of(trainer)
        shard_copies(find_copies(callbacks, module), module)
        average_shards(callbacks)
        # Parameters that are unsharded in inference mode cannot be used in training afterwards.
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
        self._make_values()
        self.model_to_device()
        if plan.dp_replicate > 1:
            check_equal_structure(module)
            equal_weights([*module.parameters(), *module.buffers()])
            equal_copies(copies_of(module, callbacks_of(trainer)), self.root_device)
            if fitting:
                by_hand = not module.automatic_optimization or is_overridden("backward", module)
                self._replica = Replica(module, self.root_device, watch_all=by_hand)
                self._undo.callback(self._replica.close)

    @override
    def model_to_device(self) -> None:
        """Move the full module to this rank's device."""
        self._module().to(self.root_device)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create the optimizers of the current parameters and adapt them to shards and pages.

        Raises:
            PlanError: an optimizer has parameters that are not the module's, or cannot step on shards.
        """
        self._reset_optimizers_and_schedulers()
        super().setup_optimizers(trainer)
        known = self._known
        # Lightning's placeholder for a missing optimizer has nothing to step.
        optimizers = [optimizer for optimizer in self.optimizers if optimizer.param_groups]
        self._adapted = (
            []
            if known is None
            else [
                AdaptedOptimizer(
                    optimizer,
                    known,
                    in_pages=self._pages,
                    before_step=self._leave_numbers,
                    after_step=self._enter_numbers,
                )
                for optimizer in optimizers
            ]
        )
        for adapted in self._adapted:
            self._undo.callback(adapted.undo)
        self._page(optimizers)

    @override
    def teardown(self) -> None:
        """Restore the module except for its weights; a sharded module stays sharded, on its device."""
        self._uneven = None
        self._replica = None
        self._forget_values()
        self._known = None
        self._tensor_mesh = None
        self._converted_by = None
        self._close_tiers()
        self.precision_plugin.teardown()
        self._undo.close()
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


# The Trainer accepts torch.compile(module) only with SingleDeviceStrategy, DDPStrategy or FSDPStrategy, and checks for
# SingleDeviceStrategy nowhere else.
SingleDeviceStrategy.register(LargeScaleStrategy)
