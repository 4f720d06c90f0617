"""ModuleCopies: copies of the module that callbacks keep, such as weight averages, sharded as the module is."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.parallel.copies import average_shards, find_copies, shard_copies
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class ModuleCopies(Technique):
    """Copies that callbacks keep of a sharded module are sharded too."""

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.plan.gathers

    @override
    def ready(self) -> None:
        callbacks = callbacks_of(self.run.trainer)
        shard_copies(find_copies(callbacks, self.run.module), self.run.module)
        average_shards(callbacks)
