"""ModuleCheckpoints: full and sharded state of a strategy's module, for checkpoints and for user code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_largescale.checkpoint.directory import load_directory, save_directory
from lightning_largescale.checkpoint.files import is_mappable, is_remote, is_truncated, load_file
from lightning_largescale.checkpoint.full_state import full_module_state, full_optimizer_state, whole_everywhere
from lightning_largescale.checkpoint.optimizers import (
    StateMemory,
    indexed_optimizer_state,
    kinds_of,
    load_optimizer_state,
    named_optimizer_state,
    saved_kinds,
)
from lightning_largescale.checkpoint.orders import tell_orders
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.adapted_optimizer import AdaptedOptimizer
from lightning_largescale.parallel.embedding import row_sharded
from lightning_largescale.parallel.sharded import sharded_state


class ModuleCheckpoints:
    """Checkpoints of a module that may be sharded: directories of shards, or files of full tensors.

    Args:
        strategy: Lightning's strategy, which has the module, its optimizers and the checkpoint plugin.
        save_full: whether checkpoints of a sharded module are files of full tensors, assembled on rank 0.
        may_shard: returns whether the module may be sharded.

    Attributes:
        adapted: the optimizers that step on shards.
        keeps_on_disk: whether state is offloaded to disk, which must not be loaded into memory to be saved.
        state_memory: returns, for an optimizer, a function from a parameter and a state key to the memory to load into.
    """

    def __init__(self, strategy: ParallelStrategy, *, save_full: bool, may_shard: Callable[[], bool]) -> None:
        self._strategy, self._save_full, self._may_shard = strategy, save_full, may_shard
        self.adapted: Sequence[AdaptedOptimizer] = ()
        self.close()

    def close(self) -> None:
        """Forget the run, which has memory for state and may keep it on disk."""
        self.keeps_on_disk = False
        self.state_memory: Callable[[Optimizer], StateMemory | None] = _nowhere

    @property
    def _module(self) -> LightningModule:
        module = self._strategy.lightning_module
        if module is None:
            raise RuntimeError("the Trainer has not given the strategy its module yet")
        return module

    @property
    def _is_sharded(self) -> bool:
        return sharded_state(self._module) is not None or row_sharded(self._module) is not None

    @property
    def are_directories(self) -> bool:
        """Return whether checkpoints are directories, to which each rank writes its shards."""
        return (self._is_sharded or self.keeps_on_disk) and not self._are_full

    @property
    def _plain_files(self) -> bool:
        """Return whether checkpoint files are written by torch.save, and not by a checkpoint plugin of the Trainer."""
        return type(self._strategy.checkpoint_io) is TorchCheckpointIO

    @property
    def _are_full(self) -> bool:
        """Return whether checkpoints of a sharded module are files of full tensors."""
        return self._save_full or not self._plain_files

    def read(self, path: Any, weights_only: bool | None) -> dict[str, Any] | None:
        """Read a checkpoint whose tensors can be read lazily and in part; return None for one that cannot.

        Raises:
            PlanError: a directory is not a checkpoint, or a directory or file is incomplete.
        """
        if Path(path).is_dir():
            return load_directory(Path(path), weights_only=weights_only)
        if self._may_shard() and self._plain_files and is_mappable(path):
            loaded: dict[str, Any] = load_file(path, weights_only=weights_only)
            return loaded
        if is_truncated(path):
            raise PlanError(
                f"checkpoint {str(path)!r} is truncated: it has a beginning and no end; resume from another one."
            )
        return None

    def module_state(self) -> dict[str, Any]:
        """Return the module's state for a checkpoint: shards, or full tensors on rank 0; a collective."""
        return self._module.state_dict() if self.are_directories else self.full_module_state()

    def full_module_state(self) -> dict[str, Any]:
        """Return the module's `state_dict` with full tensors, only on rank 0 if it is sharded: a collective."""
        if not self._is_sharded:
            return self._module.state_dict()
        return full_module_state(self._module, keep=self._strategy.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return an optimizer's state for a checkpoint, None if it is that of a plain run: a collective.

        A sharded module's has shards by parameter name, or full tensors by parameter index on rank 0.

        Raises:
            PlanError: shards cut through blocks in which the optimizer keeps its state.
        """
        # Lightning's placeholder for a missing optimizer has no parameters.
        if not optimizer.param_groups or not (self._is_sharded or self.are_directories):
            return None
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for adapted in self.adapted:
            if adapted.optimizer is inner:
                adapted.check_state()
        if not self.are_directories:
            return full_optimizer_state(inner, keep=self._strategy.is_global_zero)
        return named_optimizer_state(inner, self._module)

    def load_optimizer_states(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer states in order, each rank its shards; surplus states or optimizers are skipped.

        Lightning's placeholder for a missing optimizer is ignored, both in the checkpoint and among the optimizers.

        Raises:
            PlanError: a state is of another kind of optimizer, or of other parameters.
        """
        kinds = dict(enumerate(saved_kinds(checkpoint) or ()))
        saved = [
            (state, kinds.get(number, ()))
            for number, state in enumerate(checkpoint["optimizer_states"])
            if "param_groups" in state
        ]
        optimizers = [optimizer for optimizer in self._strategy.optimizers if optimizer.param_groups]
        if len(saved) != len(optimizers):
            rank_zero_warn(
                f"The checkpoint has the states of {len(saved)} optimizers and configure_optimizers made"
                f" {len(optimizers)}: the first {min(len(saved), len(optimizers))} are loaded; others of the module"
                " start anew, others of the checkpoint are left out."
            )
        for optimizer, (state, own) in zip(optimizers, saved, strict=False):
            memory_of = self.state_memory(optimizer) or _new_memory
            load_optimizer_state(optimizer, state, self._module, kinds=own, memory_of=memory_of)
        for adapted in self.adapted:
            adapted.divide_state()

    def save(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> dict[str, Any] | None:
        """Write a checkpoint to a directory, and return None, or return the one to write to a file: a collective.

        It is a directory, to which each rank writes its shards, if the module is sharded or state is offloaded to disk.
        It is a file otherwise; also with `save_full`, with a checkpoint plugin of the Trainer, and on file systems that
        are not mounted.

        Raises:
            PlanError: `path` is a folder that is not a checkpoint, or `storage_options` are given for a directory.
        """
        if not self._is_sharded and not self.are_directories:
            return checkpoint
        tell_orders(checkpoint, self._module)
        if self._are_full or is_remote(path):
            return self._full(checkpoint)
        if storage_options is not None:
            raise PlanError("storage_options are for checkpoints that are files; leave them out, or save_full=True.")
        optimizers = [kinds_of(optimizer) for optimizer in self._strategy.optimizers]
        save_directory(checkpoint, Path(self._strategy.broadcast(str(path))), optimizers=optimizers)
        return None

    def _full(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return `checkpoint` with full tensors and optimizer states by parameter index: a collective."""
        full: dict[str, Any] = whole_everywhere(checkpoint, keep=self._strategy.is_global_zero)
        if not self._are_full and "optimizer_states" in full:
            states = [indexed_optimizer_state(state) for state in full["optimizer_states"]]
            full = {**full, "optimizer_states": states}
        return full


def _new_memory(parameter: Any, key: str) -> None:
    return None


def _nowhere(optimizer: Optimizer) -> None:
    return None
