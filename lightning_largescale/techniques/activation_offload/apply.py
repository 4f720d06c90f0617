"""ActivationOffload: tensors that blocks save for backward, in another tier until then."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.offload.activations import offload_activations
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class ActivationOffload(Technique):
    """Saved tensors of blocks leave the device after a block's forward and come back for its backward."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.offload_activations is not None

    @override
    def check(self) -> None:
        if self.run.plan.offload_activations == "nvme":
            self.run.open_store()

    @override
    def wrap(self) -> None:
        run = self.run
        run.exits.callback(offload_activations(run.module, run.plan, run.store, run.device))
