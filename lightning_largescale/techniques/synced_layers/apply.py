"""SyncedLayers: batch norms whose statistics are of all ranks, as `Trainer(sync_batchnorm=True)` asks for."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class SyncedLayers(Technique):
    """Layers that Lightning's plugin replaces by synchronized ones."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.fits and run.layer_sync is not None

    @override
    def wrap(self) -> None:
        run = self.run
        if run.layer_sync is None or sharded_state(run.module) is not None:
            return
        run.layer_sync.apply(run.module)
        if not run.plan.gathers:
            # A sharded module keeps its layers: FSDP2 would not know replaced ones.
            run.exits.callback(run.layer_sync.revert, run.module)
