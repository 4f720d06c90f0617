"""ActivationCheckpoint: recomputation of the blocks that the plan names."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.parallel.recompute import apply_recompute, remove_recompute
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class ActivationCheckpoint(Technique):
    """Blocks keep their input and recompute their forward in backward."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.activation_checkpointing != "none"

    @override
    def wrap(self) -> None:
        self.run.exits.callback(remove_recompute, self.run.module)
        apply_recompute(self.run.module, self.run.plan)
