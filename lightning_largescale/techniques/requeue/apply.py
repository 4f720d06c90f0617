"""RequeueOnSignal: save and requeue the job on SLURM's signal, once all ranks are between two steps."""

from __future__ import annotations

from functools import partial

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from typing_extensions import override

from lightning_largescale.parallel.sharded import reshard
from lightning_largescale.requeue import Requeue
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class RequeueOnSignal(Technique):
    """A job that its cluster requeues."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        environment = run.strategy.cluster_environment
        return isinstance(environment, SLURMEnvironment) and environment.auto_requeue

    @override
    def ready(self) -> None:
        run, environment = self.run, self.run.strategy.cluster_environment
        assert isinstance(environment, SLURMEnvironment)
        run.requeue = Requeue(
            run.trainer,
            environment,
            run.device,
            has_peers=run.has_peers,
            before_save=partial(reshard, run.module),
        )
        run.exits.callback(run.requeue.undo)

    @override
    def end_evaluation(self) -> None:
        if self.run.requeue is not None:
            self.run.requeue.meet()

    @override
    def train_end(self) -> None:
        """Handle a signal that came with the last batch."""
        if self.run.requeue is not None:
            self.run.requeue.meet()

    @override
    def close(self) -> None:
        self.run.requeue = None
