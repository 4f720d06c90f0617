"""UnevenInputs: ranks that run out of batches at different times in evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.parallel.copies import equal_copies, find_copies
from lightning_largescale.parallel.equal import equal_weights
from lightning_largescale.parallel.uneven import UnevenSteps, any_rank, check_not_empty
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class UnevenInputs(Technique):
    """In evaluation, ranks without batches join others' collectives."""

    _uneven: UnevenSteps | None = None

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return True

    @override
    def start_evaluation(self, *, logged: bool) -> None:
        run, module = self.run, self.run.module
        if run.has_peers:
            if logged:
                check_not_empty(compat.evaluation_is_empty(run.trainer), run.device)
            # Buffers such as running statistics differ between ranks in training; rank 0's are saved.
            equal_weights(module.buffers())
            copies = find_copies(callbacks_of(run.trainer), module)
            equal_copies(copies, run.device, buffers_only=True)
        if run.is_sharded or run.requeue is not None:
            meet = partial(any_rank, device=run.device) if run.requeue is None else run.requeue.meet
            self._uneven = UnevenSteps(module, meet)
            compat.call_when_exhausted(run.trainer, run.end_steps)

    @override
    def check_step(self, stage: str, args: tuple[Any, ...]) -> None:
        if self._uneven is not None and stage != "training_step":
            self._uneven.start()

    @override
    def end_steps(self) -> None:
        if self._uneven is not None:
            self._uneven.end()

    @override
    def end_evaluation(self) -> None:
        self._uneven = None

    @override
    def abort_step(self) -> None:
        self._uneven = None

    @override
    def close(self) -> None:
        self._uneven = None
