"""ActivationCheckpoint: recomputation of the blocks that the plan names."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.run import Run
from lightning_largescale.technique import Technique
from lightning_largescale.techniques.activation_checkpoint.recompute import (
    apply_recompute,
    recomputes,
    remove_recompute,
)


class ActivationCheckpoint(Technique):
    """Blocks keep their input and recompute their forward in backward."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        # A copy of a module that was made within another run recomputes as that run does.
        return run.plan.activation_checkpointing != "none" or recomputes(run.module)

    @override
    def wrap(self) -> None:
        self.run.exits.callback(remove_recompute, self.run.module)
        apply_recompute(self.run.module, self.run.plan)
