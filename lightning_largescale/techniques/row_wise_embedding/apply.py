"""RowWiseEmbedding: the tables that the plan names, their rows sharded over all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from functools import partial
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.parallel.copies import find_copies
from lightning_largescale.parallel.embedding import check_embeddings, check_no_copies, row_sharded, shard_embeddings
from lightning_largescale.parallel.lookups import Lookups
from lightning_largescale.parallel.sharded import meet
from lightning_largescale.parallel.uneven import joined_look_ups
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class RowWiseEmbedding(Technique):
    """Embedding tables whose rows are looked up by an exchange of ids."""

    _lookups: Lookups | None = None

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return bool(run.plan.row_sharded_embeddings) or row_sharded(run.module) is not None

    @override
    def prepare(self) -> None:
        """Shard the tables that the plan names, after unsharding those of a different earlier plan.

        Raises:
            PlanError: a table cannot be sharded, or a callback keeps a copy of the module.
        """
        run, module, names = self.run, self.run.module, self.run.plan.row_sharded_embeddings
        lookups = row_sharded(module)
        if lookups is not None and not lookups.serves(names, run.processes.world_size):
            run.unshard()
            lookups = None
        if lookups is None and names:
            check_embeddings(module, names, run.plan.world_size, run.plan.extra_fsdp_modules)
            if run.plan.world_size > 1:
                check_no_copies(find_copies(callbacks_of(run.trainer), module), names)
                lookups = shard_embeddings(module, names, run.device)
        self._lookups = lookups

    @override
    def close(self) -> None:
        self._lookups = None

    @override
    def step(self, stage: str) -> contextlib.AbstractContextManager[Any]:
        return joined_look_ups(self.run.module)

    @override
    def before_backward(self, loss: Tensor) -> None:
        if self._lookups is None:
            return
        if not self.run.module.automatic_optimization:
            self._lookups.join()
        # Pending row gradients would be attributed to this backward.
        self._lookups.check_sent()
        compat.call_after_backward(loss, partial(self._send_rows, self._lookups))

    def _send_rows(self, lookups: Lookups) -> None:
        """Send gradients of embedding rows to the ranks that own them, after all ranks have met."""
        if lookups.synchronize:
            meet(self.run.module)
        lookups.end_backward()

    @contextlib.contextmanager
    @override
    def no_sync(self) -> Generator[None, None, None]:
        if self._lookups is not None:
            self._lookups.synchronize = False
        try:
            yield
        finally:
            if self._lookups is not None:
                self._lookups.synchronize = True

    @override
    def abort_step(self) -> None:
        if self._lookups is not None:
            self._lookups.forget()
