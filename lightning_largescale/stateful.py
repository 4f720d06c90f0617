"""StatefulStrategy: what a module that may be divided is to those who read it whole: checkpoints, callbacks."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale import checkpoint
from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.connected import ConnectedStrategy
from lightning_largescale.parallel.copies import find_copies, whole_copies
from lightning_largescale.parallel.embedding import make_tables_whole, row_sharded, whole_tables
from lightning_largescale.parallel.gather import sharded_state
from lightning_largescale.parallel.optimizer import AdaptedOptimizer
from lightning_largescale.parallel.whole import make_whole, whole_parameters


class StatefulStrategy(ConnectedStrategy):
    """Gives and takes full tensors, however the module's own are divided."""

    _adapted: Sequence[AdaptedOptimizer] = ()

    def _module(self) -> LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("the Trainer has not given the strategy its module yet")
        return self.lightning_module

    def _is_divided(self) -> bool:
        """Whether ranks hold parts of the module's parameters."""
        module = self._module()
        return sharded_state(module) is not None or row_sharded(module) is not None

    @contextlib.contextmanager
    def full_parameters(self) -> Generator[None, None, None]:
        """Within, the module's parameters are full plain tensors, however they are divided: a collective.

        For code that reads `parameters()` or `state_dict()`, or writes into them: what is written is kept, and is to be
        the same on all ranks. The whole model must fit beside this rank's shards. In `training_step` they are for
        reading, and a loss may be computed from them; elsewhere they have no gradients.
        """
        with whole_tables(self._module()), whole_parameters(self._module()):
            yield

    def make_whole(self) -> None:
        """Give the module full plain parameters for good, on the CPU and equal on all ranks: a collective.

        After `fit` under a sharded plan, for code that knows nothing of ranks. Optimizers do not train them any more.
        Copies of the module that callbacks keep become whole with it.
        """
        module = self._module()
        make_tables_whole(module)
        make_whole(module)
        whole_copies(find_copies(callbacks_of(module.trainer), module))

    # While a batch size is searched for.
    searching = False

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; in a search it is rank 0's, since each rank has made up a path of its own."""
        path = self.broadcast(checkpoint_path) if self.searching else checkpoint_path
        return super().load_checkpoint(path, weights_only)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full tensors, on rank 0 alone where the module is sharded; a collective."""
        module = self._module()
        if not self._is_divided():
            return super().lightning_module_state_dict()
        return checkpoint.full_module_state(module, keep=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Full tensors by parameter index, on rank 0 alone where the module is sharded; a collective.

        Raises:
            PlanError: shards cut what the optimizer keeps in blocks.
        """
        if not self._is_divided():
            return super().optimizer_state(optimizer)
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for adapted in self._adapted:
            if adapted.optimizer is inner:
                adapted.check_state()
        return checkpoint.full_optimizer_state(inner, keep=self.is_global_zero)

    @override
    def load_optimizer_state_dict(self, checkpoint_: Mapping[str, Any]) -> None:
        """Load full tensors, each rank its part."""
        for optimizer, state in zip(self.optimizers, checkpoint_["optimizer_states"], strict=False):
            checkpoint.load_optimizer_state(optimizer, state)
        for adapted in self._adapted:
            adapted.divide_state()

    @override
    def save_checkpoint(self, checkpoint_: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint of full tensors, those that callbacks and hooks put in included; a collective."""
        if self._is_divided():
            checkpoint_ = checkpoint.whole_everywhere(checkpoint_, keep=self.is_global_zero)
        super().save_checkpoint(checkpoint_, filepath, storage_options)
