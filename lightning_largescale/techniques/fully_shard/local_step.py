"""LocalOptimizerStep: optimizers that step on this rank's shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale.parallel.adapted_optimizer import AdaptedOptimizer
from lightning_largescale.parallel.known import KnownParameters
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class LocalOptimizerStep(Technique):
    """Optimizers of parameters that are sharded or replicated, and checks that there are no others."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.fits and (run.plan.world_size > 1 or run.plan.gathers)

    @override
    def ready(self) -> None:
        self.run.known = KnownParameters(self.run.module, self.run.plan)

    @override
    def optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        run = self.run
        assert run.known is not None
        adapted: list[AdaptedOptimizer] = []
        for optimizer in optimizers:
            adapted.append(
                AdaptedOptimizer(
                    optimizer,
                    run.known,
                    in_pages=run.in_pages,
                    before_step=run.clipping.leave,
                    after_step=run.clipping.enter,
                )
            )
            run.exits.callback(adapted[-1].undo)
        run.adapted = adapted

    @override
    def check_step(self, stage: str, args: tuple[Any, ...]) -> None:
        if stage == "training_step" and self.run.known is not None:
            self.run.known.check()

    @override
    def check_optimizer(self, optimizer: Optimizer) -> None:
        if self.run.known is not None:
            self.run.known.check_optimizer(optimizer)

    @override
    def abort_step(self) -> None:
        for adapted in self.run.adapted:
            adapted.forget_step()

    @override
    def close(self) -> None:
        self.run.known = None
