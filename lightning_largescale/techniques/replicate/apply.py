"""Replicate: the full module on this rank's device, its gradients averaged over all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of, copies_of
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.copies import equal_copies
from lightning_largescale.parallel.equal import check_equal_structure, equal_weights
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique
from lightning_largescale.techniques.replicate.replica import Replica, told_of_reentry


class Replicate(Technique):
    """The full module on this rank's device; with several ranks, a replica whose gradients are averaged."""

    _replica: Replica | None = None

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return not run.plan.gathers

    @override
    def ready(self) -> None:
        run, module = self.run, self.run.module
        run.strategy.model_to_device()
        if run.plan.dp_replicate == 1:
            return
        check_equal_structure(module)
        equal_weights([*module.parameters(), *module.buffers()])
        equal_copies(copies_of(module, callbacks_of(run.trainer)), run.device)
        if run.fits:
            by_hand = not module.automatic_optimization or is_overridden("backward", module)
            self._replica = Replica(module, run.device, watch_all=by_hand)
            run.exits.callback(self._replica.close)

    @override
    def close(self) -> None:
        self._replica = None

    @override
    def around_step(self, stage: str, step: Callable[[], Any]) -> Callable[[], Any]:
        if self._replica is None or stage != "training_step":
            return step
        return partial(self._replica.run, step)

    @override
    def batch_start(self, batch_idx: int) -> None:
        # Which parameters are trained is found out again once per epoch.
        if self._replica is not None and batch_idx == 0:
            self._replica.look_again()

    @override
    def before_backward(self, loss: Tensor) -> None:
        if self._replica is None:
            return
        if is_overridden("backward", self.run.module) and loss.requires_grad:
            compat.call_after_backward(loss, self._replica.finish_within)
        self._replica.prepare(loss)

    @override
    def backward(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._replica is None else told_of_reentry()

    @override
    def reduce_gradients(self) -> None:
        if self._replica is not None:
            if self.run.known is not None:
                self.run.known.check()
            self._replica.finish()

    @override
    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._replica is None else self._replica.no_reduction()

    @override
    def check_gradients(self, optimizer: Optimizer) -> None:
        if self._replica is not None and self._replica.unreduced:
            raise PlanError(
                f"{type(optimizer).__name__}.step was called with gradients of loss.backward(), which are each rank's"
                " own; run one backward of one loss in a `backward` of your own, or, under manual optimization, call"
                " self.manual_backward(loss), which averages them over the ranks."
            )

    @override
    def abort_step(self) -> None:
        if self._replica is not None:
            self._replica.forget_step()
