"""CompileBlocks: torch.compile of every repeated block."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.compile import compile_blocks
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class CompileBlocks(Technique):
    """Every repeated block is compiled by itself."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.compile is not False

    @override
    def check(self) -> None:
        if (tp := self.run.plan.tp) > 1:
            raise PlanError(f"compile={self.run.compile!r} cannot be combined with tp={tp}; leave one of them out.")

    @override
    def wrap(self) -> None:
        options = {} if isinstance(self.run.compile, bool) else self.run.compile
        self.run.exits.callback(compile_blocks(self.run.module, options))
