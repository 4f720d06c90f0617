"""LargeScaleAutoStrategy: looks at the hardware and the step, plans, then is a LargeScaleStrategy.

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
from lightning_largescale.parallel.gather import sharded_state
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
from lightning_largescale.units import parse_bytes
from lightning_largescale.workload import Workload
from lightning_largescale.workload.kinds import find_lazy, lazy_error

_Value = TypeVar("_Value")
# Enough intervals for a steady median, few enough to cost nothing.
_TIMED_STEPS = 1000
# Of the predicted peak, from where on a plain run's heap keeps no holes: it grows between two looks at it.
_NEAR = 0.97


class LargeScaleAutoStrategy(LargeScaleStrategy):
    """Trains under the plan that is predicted to be the fastest of those that fit; `report` says why.

    The plan is decided when the trainer sets the strategy up: the hardware is detected and measured (cached), one step
    is traced on fake tensors, and every admissible plan is priced. Rank 0 decides and tells the others.
    BatchSizeFinder and Tuner search under that plan, which was made for the batch size the module had before.

    Args:
        memory_budget: bytes, or text such as "6GiB", that one rank may hold in all on its device: on CPU the process's
            resident memory, what is there before included; on CUDA what torch's allocator may have, beside the context.
            Without it, 90% of what is free, beside what is held.
        allow: values that change numerics and may be chosen all the same: "bf16-mixed".
        sample_batch: a batch to trace with, in place of one from the trainer's own loader.
        plan_out: file that the chosen plan's JSON is written to, for `LargeScaleStrategy(path)`.
        nvme_path: a folder on the disk of the nvme tier; None takes that of the detected ones with the most free bytes.
        start_method: as for `LargeScaleStrategy`.
        process_group_backend: as for `LargeScaleStrategy`.
        timeout: as for `LargeScaleStrategy`.
        compile: as for `LargeScaleStrategy`; step times are predicted without it.
        save_full: as for `LargeScaleStrategy`.
        weights: as for `LargeScaleStrategy`.

    Raises:
        PlanError: an argument is not accepted; at setup, nothing fits.
    """

    decided_at_setup = ("plan", "report")

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
        # Checked as a plan's is.
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
                # Another strategy divided it, which serves for evaluation.
                self.report = None
                return sharded.plan
            # What is divided can be neither traced nor planned.
            self.make_whole()
        elif sharded is None and row_sharded(self._module()) is not None:
            self.make_whole()
        if not any(True for _ in self._module().parameters()):
            # Nothing to place, reduce or keep small.
            self.report = None
            precision = asked_precision(self.precision_plugin) or Plan().precision
            return Plan(dp_replicate=self.world_size, precision=precision)
        if sharded_state(self._module()) is None and (lazy := find_lazy(self._module())) is not None:
            # Its shape comes with the first batch, as in a plain run; nothing can be planned before.
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
        # What will run is what is traced.
        self._convert(module)
        self._told_samples_among = 0
        workload = self._looked_at(trainer)
        # The trace came first, so that products are measured at sizes like its own.
        hardware = self._hardware().calibrate(progress=shown, matmul_sizes=matmul_sizes(workload))
        # Afterwards: a first measurement leaves work buffers and threads' heaps behind, which the run holds as well.
        held = _held_beside(module, kind)
        # What the model takes now is there for it, and counted again in every plan.
        free_bytes = available_bytes(kind, hardware.memory_free_bytes) + _own_bytes(module, kind)
        ranks = self._gathered((free_bytes, held))
        self.report = self._told_by_rank_zero(lambda: self._plans(trainer, hardware, workload, ranks))
        best = self.report.best
        if best.tp > 1 and not self._gives_the_same_samples(trainer, best):
            told = "tensor parallelism is left out, since the loader gives each rank samples of its own"
            workload = dataclasses.replace(workload, divisions={}, approximate=(*workload.approximate, told))
            self.report = self._told_by_rank_zero(lambda: self._plans(trainer, hardware, workload, ranks))
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
        if estimate is not None and self._heap_is("left"):
            # Nothing else keeps it as small as it was predicted.
            self._watch_heap(int(_NEAR * estimate.memory.peak_bytes))

    @override
    def on_search_end(self) -> None:
        # What the trials took and lasted is not the run's.
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
        """Whether the plan in force serves: the same module, and it was planned for training or is only evaluated now.

        A module that is sharded already stays so.
        """
        module, planned_for = self._planned_for
        if module is not self.lightning_module:
            return False
        return planned_for == TrainerFn.FITTING or trainer.state.fn != TrainerFn.FITTING or self.plan.shards

    def _looked_at(self, trainer: Trainer) -> Workload:
        """The step that is about to run, in what may be chosen, and in what is priced for the advice alone."""
        asked = asked_precision(self.precision_plugin)
        precisions = (asked,) if asked else ("32-true", *LOSSY)
        workload = self._traced(trainer, precisions, self._tp_sizes())
        # Nobody asked for what is only priced for the advice.
        unasked = tuple(set(precisions) - {"32-true", asked, *self._allow})
        return dataclasses.replace(
            workload, approximate=tuple(note for note in workload.approximate if not note.startswith(unasked))
        )

    def _gives_the_same_samples(self, trainer: Trainer, plan: Plan) -> bool:
        """Whether the loaders give the ranks of tensor parallelism the same samples under `plan`: a collective."""
        before, self.plan = self.plan, plan
        self._divide_samples_for(trainer, plan)
        try:
            own = samples_of_rank(trainer)
        except Exception:
            # Some loaders can only be made once the run is under way, which then compares what they give.
            own = ()
        finally:
            self.plan = before
        found = self._gathered(own)
        return all(one == found[rank - rank % plan.tp] for rank, one in enumerate(found))

    def _divide_samples_for(self, trainer: Trainer, plan: Plan) -> None:
        """Let loaders that were asked for early, and divided their samples for another plan, be asked for again."""
        if self._told_samples_among not in (0, plan.tp):
            ask_for_loaders_again(trainer)
            self._told_samples_among = 0

    def _tp_sizes(self) -> tuple[int, ...]:
        """Numbers of ranks that tensor parallelism may have: those that divide the ranks of a node."""
        if self._compile is not False:
            return ()
        return tuple(size for size in range(2, self.num_processes + 1) if self.num_processes % size == 0)

    def _plans(self, trainer: Trainer, hardware: Hardware, workload: Workload, ranks: list[tuple[int, int]]) -> Report:
        """The report of a search; `ranks` has the free bytes of each rank and those it holds beside the model."""
        return find_plans(
            workload,
            dataclasses.replace(hardware, memory_free_bytes=min(free for free, _ in ranks)),
            allow=self._allow,
            memory_budget=self._memory_budget,
            baseline_bytes=max(held for _, held in ranks),
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            precision=asked_precision(self.precision_plugin),
            may_release=needs_all_gradients(trainer, self._module()) is None,
            built=self._find_unmade() is None,
        )

    def _gathered(self, value: _Value) -> list[_Value]:
        """Every rank's `value`, in the order of ranks."""
        return [value] if self.world_size == 1 else comm.all_gather_object(value)

    def _median_step_seconds(self) -> float | None:
        """From one micro-batch's start to the next one's, times the micro-batches of a step."""
        starts = list(self._step_starts)
        if len(starts) < 2 or self.report is None:
            return None
        return self.report.accumulate_grad_batches * statistics.median(b - a for a, b in itertools.pairwise(starts))


def _held_beside(module: nn.Module, kind: str) -> int:
    """Bytes this process holds on its device tier beside the module's own parameters and buffers."""
    release_free_memory()
    return max(0, held_bytes(kind) - _own_bytes(module, kind))


def _own_bytes(module: nn.Module, kind: str) -> int:
    """Bytes of the module's parameters and buffers on the device tier; each storage once."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    here = [tensor for tensor in tensors if tensor.device.type == kind and not is_lazy(tensor)]
    storages = [part.untyped_storage() for tensor in here for part in compat.dense_parts(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
