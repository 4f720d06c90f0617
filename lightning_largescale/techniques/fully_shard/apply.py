"""FullyShard: parameters, gradients and optimizer state sharded over the data-parallel ranks, gathered for steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.parallel.equal import check_equal_structure
from lightning_largescale.parallel.shard import finish_sharding, shard_groups
from lightning_largescale.parallel.sharded import reshard, sharded_state
from lightning_largescale.parallel.sharded_step import (
    begin_backward,
    end_backward,
    forget_step,
    no_reduction,
    optimizing,
    run_step,
)
from lightning_largescale.precision import cast_type
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class FullyShard(Technique):
    """FSDP groups of blocks, gathered for each step; also of one rank, whose parameters are offloaded."""

    # Whether `shard` has sharded the module, which an earlier run has not.
    _is_begun = False

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.gathers

    @override
    def prepare(self) -> None:
        if self.run.mesh is not None and sharded_state(self.run.module) is None:
            check_equal_structure(self.run.module)

    @override
    def shard(self) -> None:
        run = self.run
        run.sharding = sharded_state(run.module)
        if run.mesh is None or run.sharding is not None:
            return
        self._is_begun = True
        run.sharding = shard_groups(
            run.module,
            run.plan,
            run.mesh,
            run.device,
            gather_type=cast_type(run.strategy.precision_plugin),
            parts=run.shards,
            on_parts=run.on_shards,
        )

    @override
    def ready(self) -> None:
        run, trainer = self.run, self.run.trainer
        if self._is_begun and run.sharding is not None:
            finish_sharding(run.module, run.sharding, run.device)
        # Parameters that are unsharded in inference mode cannot be used in training afterwards.
        fit_validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fit_validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            run.exits.callback(setattr, loop, "inference_mode", loop.inference_mode)
            loop.inference_mode = False

    @override
    def around_step(self, stage: str, step: Callable[[], Any]) -> Callable[[], Any]:
        return partial(run_step, self.run.module, stage, step)

    @override
    def after_step(self, stage: str) -> None:
        module = self.run.module
        if stage == "training_step" and (not module.automatic_optimization or compat.skips_backward(module.trainer)):
            reshard(module)

    @override
    def before_backward(self, loss: Tensor) -> None:
        module = self.run.module
        if not module.automatic_optimization and sharded_state(module):
            begin_backward(module, loss)

    @override
    def after_backward(self) -> None:
        end_backward(self.run.module)

    @override
    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which backward does not reduce gradients.

        It still reduces them if hooks read them after backward, or if parameters are offloaded: unreduced gradients
        would be unsharded on the device.
        """
        module = self.run.module
        if self.run.plan.offload_parameters is None and sharded_state(module) and not _looks_after_backward(module):
            return no_reduction(module)
        return contextlib.nullcontext()

    @override
    def update(self) -> contextlib.AbstractContextManager[Any]:
        return optimizing(self.run.module)

    @override
    def abort_step(self) -> None:
        if sharded_state(self.run.module):
            forget_step(self.run.module)

    @override
    def end_steps(self) -> None:
        reshard(self.run.module)

    @override
    def end_evaluation(self) -> None:
        reshard(self.run.module)


def _looks_after_backward(module: LightningModule) -> bool:
    """Return whether an `on_after_backward` hook runs after a backward of automatic optimization.

    The shards would have no gradients for it if they were not reduced.
    """
    name = "on_after_backward"
    return module.automatic_optimization and (
        is_overridden(name, module) or any(is_overridden(name, one, Callback) for one in callbacks_of(module.trainer))
    )
