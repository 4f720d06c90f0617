"""LargeScaleAutoStrategy: a LargeScaleStrategy that plans from the detected hardware and the traced step.

Source: Nagrecha 2023, "Systems for Parallel and Distributed Large-Model Deep Learning Training", section 4.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_largescale import comm, compat
from lightning_largescale.callbacks import needs_all_gradients, shows_summary
from lightning_largescale.checkpoint.weights import Weights
from lightning_largescale.console import show
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.disks import disk_at
from lightning_largescale.hardware.usage import available_bytes, held_bytes, peak_bytes, release_free_memory, start_peak
from lightning_largescale.offload.folder import nvme_folder
from lightning_largescale.parallel.embedding import row_sharded
from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.plan import Plan
from lightning_largescale.planner import Report, find_plans
from lightning_largescale.planner.matmuls import matmul_sizes
from lightning_largescale.planner.panel import after_fit, setup_panel
from lightning_largescale.planner.ranking import LOSSY
from lightning_largescale.planner.search import check_allow
from lightning_largescale.precision import asked_precision
from lightning_largescale.record import record_plan
from lightning_largescale.sample import ask_for_loaders_again, samples_of_rank
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.technique import Technique
from lightning_largescale.units import parse_bytes
from lightning_largescale.workload import Workload
from lightning_largescale.workload.kinds import find_lazy, lazy_error

_Value = TypeVar("_Value")
# Enough intervals for a stable median, few enough to cost next to nothing.
_TIMED_STEPS = 1000
# Share of the predicted peak above which a plain run's heap is trimmed; it grows between two checks.
_NEAR = 0.97


class LargeScaleAutoStrategy(LargeScaleStrategy):
    """Strategy that trains under the plan with the lowest predicted step time that fits; `report` gives the reasons.

    The plan is decided at setup: the hardware is detected and measured (cached), one step is traced on fake tensors,
    and the cost of every admissible plan is predicted. Rank 0 decides and broadcasts the plan. BatchSizeFinder and
    Tuner search under that plan, which was made for the module's original batch size.

    Args:
        memory_budget: the bytes, or text such as "6GiB", that one rank may hold on its device in total: on CPU the
            process's resident memory, including what it holds before; on CUDA the memory of torch's allocator, without
            the context. By default, 90% of the free memory, in addition to what is held already.
        allow: values that change numerics and may be chosen nevertheless: "bf16-mixed".
        sample_batch: a batch to trace with, in place of one from the trainer's loader.
        plan_out: the file to which the chosen plan's JSON is written, for `LargeScaleStrategy(path)`.
        nvme_path: a folder on the disk of the nvme tier; None selects the detected disk with the most free bytes.
        start_method: as for `LargeScaleStrategy`.
        process_group_backend: as for `LargeScaleStrategy`.
        timeout: as for `LargeScaleStrategy`.
        compile: as for `LargeScaleStrategy`; step times are predicted without it.
        save_full: as for `LargeScaleStrategy`.
        weights: as for `LargeScaleStrategy`.

    Raises:
        PlanError: an argument is not accepted; at setup, no plan fits.
    """

    decided_at_setup = ("plan", "report")
    _searches_plan = True

    def __init__(
        self,
        *,
        memory_budget: int | str | None = None,
        allow: Sequence[str] = (),
        sample_batch: Any = None,
        plan_out: str | Path | None = None,
        nvme_path: str | Path | None = None,
        start_method: Literal["popen", "fork", "spawn"] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        compile: bool | Mapping[str, Any] = False,
        save_full: bool = False,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(
            Plan(),
            start_method=start_method,
            process_group_backend=process_group_backend,
            timeout=timeout,
            compile=compile,
            sample_batch=sample_batch,
            save_full=save_full,
            weights=weights,
        )
        self._memory_budget = None if memory_budget is None else parse_bytes(memory_budget, name="memory_budget")
        check_allow(allow)
        self._allow = tuple(allow)
        self._plan_out = plan_out
        # Checked like the field of a plan.
        self._nvme_path = Plan(nvme_path=nvme_path).nvme_path  # type: ignore[arg-type]  # a path is made text
        self.report: Report | None = None
        self._planned_for: tuple[object, TrainerFn | None] = (None, None)
        self._step_starts: deque[float] = deque(maxlen=_TIMED_STEPS)

    @override
    def _hardware(self) -> Hardware:
        found = super()._hardware()
        if self._nvme_path is None:
            return found
        return dataclasses.replace(found, disks=(disk_at(nvme_folder(Plan(nvme_path=self._nvme_path), ())),))

    @override
    def _decide(self, trainer: Trainer) -> Plan:
        self._step_starts.clear()
        sharded = sharded_state(self._module())
        if sharded is not None and self._planned_for[0] is not self._module():
            if trainer.state.fn != TrainerFn.FITTING or sharded.plan.world_size != self.world_size:
                # Another strategy's sharding is kept for evaluation.
                self.report = None
                return sharded.plan
            # A sharded module can be neither traced nor planned.
            self.make_whole()
        elif sharded is None and row_sharded(self._module()) is not None:
            self.make_whole()
        if not any(True for _ in self._module().parameters()):
            # Without parameters there is nothing to plan.
            self.report = None
            precision = asked_precision(self.precision_plugin) or Plan().precision
            return Plan(dp_replicate=self.world_size, precision=precision)
        if sharded_state(self._module()) is None and (lazy := find_lazy(self._module())) is not None:
            # The first batch sets lazy shapes, as in a plain run; nothing can be planned before.
            if self.world_size > 1:
                raise lazy_error(lazy)
            self.report = None
            return Plan(precision=asked_precision(self.precision_plugin) or Plan().precision)
        if self._keeps_plan(trainer):
            start_peak(self.root_device.type)
            return self.plan
        kind = self.root_device.type
        shown = shows_summary(trainer)
        module = self._module()
        # The module is traced in the precision in which it will run.
        self._values.convert()
        self._told_samples_among = 0
        workload = self._looked_at(trainer)
        # After the trace, so that matrix products are measured at sizes like the step's.
        hardware = self._hardware().calibrate(progress=shown, matmul_sizes=matmul_sizes(workload))
        # After the measurement: a first one leaves work buffers and threads' heaps, which the run holds as well.
        held = _held_beside(module, kind)
        # The model's current memory is available to it, and every plan counts it again.
        free_bytes = available_bytes(kind, hardware.memory_free_bytes) + _own_bytes(module, kind)
        ranks = self._gathered((free_bytes, held))
        self.report = self._tracer.decided_by_rank_zero(lambda: self._plans(trainer, hardware, workload, ranks))
        best = self.report.best
        if best.tp > 1 and not self._gives_the_same_samples(trainer, best):
            told = "tensor parallelism is left out, since the loader gives each rank samples of its own"
            workload = dataclasses.replace(workload, divisions={}, approximate=(*workload.approximate, told))
            self.report = self._tracer.decided_by_rank_zero(lambda: self._plans(trainer, hardware, workload, ranks))
            best = self.report.best
        self._divide_samples_for(trainer, best)
        self._planned_for = (module, trainer.state.fn)
        start_peak(kind)
        if self.is_global_zero:
            if self._plan_out is not None:
                dataclasses.replace(best, nvme_path=self._nvme_path).save(self._plan_out)
            if shown:
                show(setup_panel(self.report))
        return best

    @override
    def _record(self, trainer: Trainer) -> None:
        record_plan(trainer, self.plan, report=None if self.report is None else self.report.to_json())

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        estimate = None if self.report is None else self.report.estimate_of(self.plan)
        if estimate is not None:
            # Nothing else keeps the heap below the predicted peak.
            self._techniques.each(Technique.limit_memory, int(_NEAR * estimate.memory.peak_bytes))

    @override
    def on_search_end(self) -> None:
        # Memory and time of the search's trials do not count for the run.
        self._step_starts.clear()
        start_peak(self.root_device.type)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._step_starts.append(perf_counter())

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self.report is None:
            return
        measured = self._gathered((peak_bytes(self.root_device.type), self._median_step_seconds()))
        if self.is_global_zero and shows_summary(self._module().trainer):
            peaks = [peak for peak, _ in measured if peak is not None]
            said = after_fit(self.report.best_estimate, max(peaks, default=None), measured[0][1])
            show(said, markup=False, highlight=False, soft_wrap=True)

    def _keeps_plan(self, trainer: Trainer) -> bool:
        """Return whether to keep the current plan.

        It is kept for the same module if it was made for training, if the module is only evaluated now, or if it shards
        the module, which stays sharded.
        """
        module, planned_for = self._planned_for
        if module is not self.lightning_module:
            return False
        return planned_for == TrainerFn.FITTING or trainer.state.fn != TrainerFn.FITTING or self.plan.shards

    def _looked_at(self, trainer: Trainer) -> Workload:
        """Trace the next step in all precisions that may be chosen or are only predicted for the report's advice."""
        asked = asked_precision(self.precision_plugin)
        precisions = (asked,) if asked else ("32-true", *LOSSY)
        workload = self._tracer.trace(trainer, precisions, self._tp_sizes())
        # Notes about precisions that only the advice needs are left out.
        unasked = tuple(set(precisions) - {"32-true", asked, *self._allow})
        return dataclasses.replace(
            workload, approximate=tuple(note for note in workload.approximate if not note.startswith(unasked))
        )

    def _gives_the_same_samples(self, trainer: Trainer, plan: Plan) -> bool:
        """Return whether loaders yield tensor-parallel ranks the same samples under `plan`: a collective."""
        before, self.plan = self.plan, plan
        self._divide_samples_for(trainer, plan)
        try:
            own = samples_of_rank(trainer)
        except Exception:
            # Some loaders can only be created during the run, which then compares their batches.
            own = ()
        finally:
            self.plan = before
        found = self._gathered(own)
        return all(one == found[rank - rank % plan.tp] for rank, one in enumerate(found))

    def _divide_samples_for(self, trainer: Trainer, plan: Plan) -> None:
        """Make the trainer request its loaders again if they were created early with samplers for another `tp`."""
        if self._told_samples_among not in (0, plan.tp):
            ask_for_loaders_again(trainer)
            self._told_samples_among = 0

    def _tp_sizes(self) -> tuple[int, ...]:
        """Return the possible sizes of tensor parallelism: divisors of the ranks per node; none under `compile`."""
        if self._compile is not False:
            return ()
        return tuple(size for size in range(2, self.num_processes + 1) if self.num_processes % size == 0)

    def _plans(self, trainer: Trainer, hardware: Hardware, workload: Workload, ranks: list[tuple[int, int]]) -> Report:
        """Search for plans and return the report.

        Args:
            trainer: The trainer to plan for.
            hardware: The calibrated hardware.
            workload: The traced step.
            ranks: The free bytes of each rank, and the bytes that it holds beside the model.
        """
        return find_plans(
            workload,
            dataclasses.replace(hardware, memory_free_bytes=min(free for free, _ in ranks)),
            allow=self._allow,
            memory_budget=self._memory_budget,
            baseline_bytes=max(held for _, held in ranks),
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            precision=asked_precision(self.precision_plugin),
            may_release=needs_all_gradients(trainer, self._module()) is None,
            built=self._values.find_unmade() is None,
        )

    def _gathered(self, value: _Value) -> list[_Value]:
        """Return every rank's `value`, in rank order."""
        return [value] if self.world_size == 1 else comm.all_gather_object(value)

    def _median_step_seconds(self) -> float | None:
        """Return the median seconds per micro-batch, times the micro-batches of a step; None if unknown."""
        starts = list(self._step_starts)
        if len(starts) < 2 or self.report is None:
            return None
        return self.report.accumulate_grad_batches * statistics.median(b - a for a, b in itertools.pairwise(starts))


def _held_beside(module: nn.Module, kind: str) -> int:
    """Return the bytes that this process holds on its device tier beside the module's parameters and buffers."""
    release_free_memory()
    return max(0, held_bytes(kind) - _own_bytes(module, kind))


def _own_bytes(module: nn.Module, kind: str) -> int:
    """Return the bytes of the module's parameters and buffers on the device tier, counting each storage once."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    here = [tensor for tensor in tensors if tensor.device.type == kind and not is_lazy(tensor)]
    storages = [part.untyped_storage() for tensor in here for part in compat.dense_parts(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
