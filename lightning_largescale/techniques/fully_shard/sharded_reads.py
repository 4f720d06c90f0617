"""ShardedReads: user code that reads sharded tensors as if they were full."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import partial
from typing import Any

from typing_extensions import override

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.full_reads import FullReads
from lightning_largescale.parallel.numbers import WholeNumbers
from lightning_largescale.parallel.sharded import note_read
from lightning_largescale.parallel.sharded_step import end_backward, is_of_shards, sharded_in_place
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class ShardedReads(Technique):
    """Function modes around the user's code, in which sharded tensors are read as if they were full."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        # The active modes, the innermost last.
        self._reads: list[FullReads] = []

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.gathers or bool(run.plan.row_sharded_embeddings)

    @contextlib.contextmanager
    @override
    def user_code(self, *, in_step: bool) -> Generator[None, None, None]:
        if not self.run.is_sharded:
            yield
            return
        module = self.run.module
        reading = FullReads(in_step=in_step, losses=not module.automatic_optimization, note=partial(note_read, module))
        with self.own_code(), reading as reads:
            self._reads.append(reads)
            try:
                yield
            finally:
                self._reads.remove(reads)

    @contextlib.contextmanager
    @override
    def own_code(self) -> Generator[None, None, None]:
        """Context that suspends the innermost mode."""
        reads = self._reads[-1] if self._reads else None
        if reads is None or reads.suspended:
            yield
            return
        reads.suspended = True
        try:
            yield
        finally:
            reads.suspended = False

    @contextlib.contextmanager
    @override
    def hook(self, name: str) -> Generator[None, None, None]:
        """Context of a user's hook.

        In training, other than before a backward, the module's parameters are the shards that hold the gradients, also
        where they are unsharded at the time.

        Raises:
            PlanError: the hook called a function that torch does not support on sharded tensors.
        """
        module = self.run.module
        if not self.run.is_sharded:
            yield
            return
        if name == "on_after_backward":
            end_backward(module)
        with contextlib.ExitStack() as hook:
            # Before a backward, the parameters are those that the loss was computed with.
            if module.trainer.training and name not in ("optimizer_step", "on_before_backward"):
                hook.enter_context(sharded_in_place(module))
            try:
                yield
            except RuntimeError as error:
                if not is_of_shards(error):
                    raise
                raise PlanError(
                    f"{name} computed with sharded tensors what torch does not compute of them; do it in `with"
                    f" trainer.strategy.full_parameters():` on all ranks, or with their to_local() ({error})."
                ) from error

    @override
    def backward(self) -> contextlib.AbstractContextManager[Any]:
        return self.own_code()

    @override
    def update(self) -> contextlib.AbstractContextManager[Any]:
        return self.own_code()

    @override
    def clip(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which scalars of sharded gradients are full."""
        return WholeNumbers() if self.run.is_sharded else contextlib.nullcontext()
