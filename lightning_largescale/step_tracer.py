"""StepTracer: tracing of the step that is about to run, before the module is changed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_largescale import compat
from lightning_largescale.apart import ApartError, StuckError, can_run_apart, run_apart
from lightning_largescale.errors import PlanError
from lightning_largescale.precision import is_own
from lightning_largescale.sample import random_state_kept, sample_batch
from lightning_largescale.workload import Divided, Workload
from lightning_largescale.workload.snapshot import Snapshot
from lightning_largescale.workload.trace import trace_workload

_Value = TypeVar("_Value")
# Possible tensor-parallel shards by tp size, for each module and its state when it was traced (`_as_it_is`).
_found: MutableMapping[LightningModule, dict[object, Mapping[int, Mapping[str, Divided]]]] = WeakKeyDictionary()
_STEPS = {
    TrainerFn.FITTING: ("training_step", RunningStage.TRAINING),
    TrainerFn.VALIDATING: ("validation_step", RunningStage.VALIDATING),
    TrainerFn.TESTING: ("test_step", RunningStage.TESTING),
    TrainerFn.PREDICTING: ("predict_step", RunningStage.PREDICTING),
}


class StepTracer:
    """Traces the module's step on rank 0 and broadcasts the result.

    Args:
        strategy: Lightning's strategy, which has the module, its device and its precision plugin.
        sample_batch: a batch to trace with, in place of one from the trainer's own loader.
    """

    def __init__(self, strategy: ParallelStrategy, sample_batch: Any = None) -> None:
        self._strategy, self._sample_batch = strategy, sample_batch

    @property
    def _module(self) -> LightningModule:
        module = self._strategy.lightning_module
        assert module is not None
        return module

    def known_divisions(self, trainer: Trainer) -> Mapping[int, Mapping[str, Divided]]:
        """Return the possible tensor-parallel shards by tp size, as traced earlier for this stage and module state."""
        found = _found.get(self._module, {})
        return found.get(_as_it_is(trainer, self._module), {})

    def trace(self, trainer: Trainer, precisions: tuple[str, ...], tp_sizes: tuple[int, ...]) -> Workload:
        """Trace the step that is about to run on rank 0 and broadcast the result.

        Rank 0 traces in a forked process if a fork can run the step, else in this process, and then restores the
        module's state.
        """

        def traced(batch: Any, notes: tuple[str, ...], *, ask: bool = True) -> Workload:
            return self._trace(trainer, batch, notes, precisions=precisions, tp_sizes=tp_sizes, ask=ask)

        def apart() -> Workload | None:
            try:
                return run_apart(lambda: traced(*self._batch(trainer)))
            except StuckError as error:
                rank_zero_info(
                    f"lightning_largescale: the fork in which a batch and the step were looked at {error}, which it"
                    " may not have; they are looked at in this process."
                )
                return None
            except ApartError as error:
                # What ended the fork would end this process too, so no code of the module is called.
                return traced(None, (f"the step could not be traced apart ({error})",), ask=False)

        workload = None
        if self.decided_by_rank_zero(can_run_apart):
            workload = self.decided_by_rank_zero(apart)
        if workload is None:
            batch, notes = self._batch(trainer, peek=self._strategy.is_global_zero, put_back=True)

            def here() -> Workload:
                with Snapshot(self._module, batch).untouched():
                    return traced(batch, notes)

            workload = self.decided_by_rank_zero(here)
        return self._remembered(trainer, workload)

    def _remembered(self, trainer: Trainer, workload: Workload) -> Workload:
        module = self._module
        of_stages = _found.setdefault(module, {})
        as_it_is = _as_it_is(trainer, module)
        of_stages[as_it_is] = {**of_stages.get(as_it_is, {}), **workload.divisions}
        return workload

    def _batch(self, trainer: Trainer, *, peek: bool = True, put_back: bool = False) -> tuple[Any, tuple[str, ...]]:
        """Return a batch to trace with, as the loader yields it, and notes about it.

        Args:
            trainer: The trainer whose loader is read if the user gave no sample batch.
            peek: Whether to return the batch; without it, the batch is None.
            put_back: Whether to restore the dataset's state after it was read in this process.
        """
        batch = self._sample_batch
        notes: tuple[str, ...] = ()
        if batch is None:
            try:
                batch = sample_batch(trainer, peek=peek, put_back=put_back)
            except Exception as error:
                # Some loaders can only be created during the run, which then reports any error itself.
                notes = (f"no batch could be read before the run ({type(error).__name__}: {error})",)
        return batch if peek else None, notes

    def _trace(
        self,
        trainer: Trainer,
        batch: Any,
        notes: tuple[str, ...],
        *,
        precisions: tuple[str, ...],
        tp_sizes: tuple[int, ...],
        ask: bool,
    ) -> Workload:
        """Trace the step that is about to run; without a batch, estimate it from the parameters."""
        module = self._module
        step, _ = _STEPS[trainer.state.fn or TrainerFn.FITTING]
        if ask and batch is None and module.example_input_array is not None:
            step, batch = "forward", module.example_input_array
            notes = (*notes, "forward was traced on example_input_array")
        own = (
            self._strategy.precision_plugin.forward_context()
            if is_own(self._strategy.precision_plugin)
            else contextlib.nullcontext()
        )
        with _running(trainer), random_state_kept(), own:
            if batch is not None and step != "forward":
                # The batch as the step receives it, but on the CPU.
                batch = self._strategy.precision_plugin.convert_input(batch)
                batch = compat.before_transfer(module, batch)
                batch = self._strategy.batch_to_device(batch, device=torch.device("cpu"))
            workload = trace_workload(
                module,
                batch,
                step=step,
                precisions=precisions,
                device_type=self._strategy.root_device.type,
                ask=ask,
                tp_sizes=tp_sizes,
                isolated=True,
            )
        return dataclasses.replace(workload, approximate=(*notes, *workload.approximate))

    def decided_by_rank_zero(self, decide: Callable[[], _Value]) -> _Value:
        """Return on every rank what `decide` returns on rank 0.

        An error of rank 0 is raised on every rank, so that no rank waits for a failed one.
        """
        outcome: _Value | PlanError = PlanError("rank 0 sent no plan.")
        if self._strategy.is_global_zero:
            try:
                outcome = decide()
            except Exception as error:
                self._strategy.broadcast(PlanError(f"rank 0 could not plan ({type(error).__name__}: {error})."))
                raise
        outcome = self._strategy.broadcast(outcome)
        if isinstance(outcome, PlanError):
            raise outcome
        return outcome


def _as_it_is(trainer: Trainer, module: LightningModule) -> object:
    """Return a key of the stage and of the parameters' names, shapes and requires_grad, on which sharding depends."""
    return trainer.state.fn, tuple((name, one.shape, one.requires_grad) for name, one in module.named_parameters())


@contextlib.contextmanager
def _running(trainer: Trainer) -> Iterator[None]:
    """Context in which the trainer's stage is the one that is about to run, as hooks and steps may read it."""
    before = trainer.state.stage
    trainer.state.stage = _STEPS[trainer.state.fn or TrainerFn.FITTING][1]
    try:
        yield
    finally:
        trainer.state.stage = before
