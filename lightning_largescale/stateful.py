"""StatefulStrategy: full and sharded state of a module for checkpoints, callbacks and user code."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale import checkpoint
from lightning_largescale.callbacks import callbacks_of
from lightning_largescale.connected import ConnectedStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.adapted_optimizer import AdaptedOptimizer
from lightning_largescale.parallel.copies import find_copies, whole_copies
from lightning_largescale.parallel.embedding import make_tables_whole, row_sharded, whole_tables
from lightning_largescale.parallel.full_params import make_whole, whole_parameters
from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.plan import Plan


class StatefulStrategy(ConnectedStrategy):
    """Strategy that saves, loads and exposes full tensors of a module that may be sharded."""

    plan: Plan
    _adapted: Sequence[AdaptedOptimizer] = ()
    # Whether checkpoints of a sharded module are files of full tensors.
    _save_full = False

    def _module(self) -> LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("the Trainer has not given the strategy its module yet")
        return self.lightning_module

    @property
    def _fixed(self) -> bool:
        """Return whether the plan was given by the user; otherwise setup decides it."""
        raise NotImplementedError

    @property
    def _may_divide(self) -> bool:
        """Return whether the plan shards the module or offloads its parameters, or may do so once it is decided."""
        if self.plan.offload_parameters is not None or not self._fixed:
            return True
        return self.has_peers and (self.plan.shards or bool(self.plan.row_sharded_embeddings))

    def _is_divided(self) -> bool:
        """Return whether the module has sharded parameters or row-sharded embedding tables."""
        module = self._module()
        return sharded_state(module) is not None or row_sharded(module) is not None

    @property
    def _keeps_elsewhere(self) -> bool:
        """Return whether checkpointed state is on disk and must not be loaded into memory to be saved."""
        return False

    def _in_parts(self) -> bool:
        """Return whether checkpoints are directories, to which each rank writes its shards."""
        return (self._is_divided() or self._keeps_elsewhere) and not self._saves_whole()

    @contextlib.contextmanager
    def full_parameters(self) -> Generator[None, None, None]:
        """Context in which the module's sharded or offloaded parameters are full plain tensors on its device.

        Entering and leaving it is a collective. It is for code that reads `parameters()` or `state_dict()`, or writes
        into them. Written values are kept and must be the same on all ranks. The full model must fit on the device
        beside this rank's shards. In `training_step` the parameters are read-only, and a loss may be computed from
        them; elsewhere they have no gradients.
        """
        with whole_tables(self._module()), whole_parameters(self._module(), self.root_device):
            yield

    def make_whole(self) -> Mapping[Tensor, Parameter]:
        """Replace the module's shards with full plain parameters on the CPU, equal on all ranks: a collective.

        Call it after `fit` under a sharded plan, for code that is not distributed. Optimizers no longer train the
        module. Copies of the module that callbacks keep are unsharded too.

        Returns:
            The full parameter that replaces each shard.
        """
        module = self._module()
        make_tables_whole(module)
        made = make_whole(module)
        whole_copies(find_copies(callbacks_of(module.trainer), module))
        return made

    # True during a batch size search.
    searching = False

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint file or directory.

        In a batch size search, all ranks read rank 0's path, since each rank has made up its own. Tensors of a
        directory, and of a file if the module may be sharded, are read lazily and in part.

        Raises:
            PlanError: a directory is not a checkpoint, or a directory or file is incomplete.
        """
        path = self.broadcast(checkpoint_path) if self.searching else checkpoint_path
        if Path(path).is_dir():
            return checkpoint.load_directory(Path(path), weights_only=weights_only)
        if self._may_divide and self._plain_files and checkpoint.is_mappable(path):
            loaded: dict[str, Any] = checkpoint.load_file(path, weights_only=weights_only)
            return loaded
        if checkpoint.is_truncated(path):
            raise PlanError(
                f"checkpoint {str(path)!r} is truncated: it has a beginning and no end; resume from another one."
            )
        return super().load_checkpoint(path, weights_only)

    @property
    def _plain_files(self) -> bool:
        """Return whether checkpoint files are written by torch.save, and not by a checkpoint plugin of the Trainer."""
        return type(self.checkpoint_io) is TorchCheckpointIO

    def _saves_whole(self) -> bool:
        """Return whether checkpoints of a sharded module are files of full tensors."""
        return self._save_full or not self._plain_files

    def full_module_state(self) -> dict[str, Any]:
        """Return the module's `state_dict` with full tensors, only on rank 0 if it is sharded: a collective."""
        module = self._module()
        if not self._is_divided():
            return super().lightning_module_state_dict()
        return checkpoint.full_module_state(module, keep=self.is_global_zero)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state for a checkpoint: a collective.

        A sharded module has shards in it, or full tensors on rank 0 if checkpoints are files.
        """
        return self._module().state_dict() if self._in_parts() else self.full_module_state()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state for a checkpoint: a collective.

        A sharded module's has shards by parameter name, or full tensors by parameter index on rank 0 if checkpoints
        are files.

        Raises:
            PlanError: shards cut through blocks in which the optimizer keeps its state.
        """
        module = self._module()
        # Lightning's placeholder for a missing optimizer has no parameters.
        if not optimizer.param_groups or not (self._is_divided() or self._in_parts()):
            return super().optimizer_state(optimizer)
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        for adapted in self._adapted:
            if adapted.optimizer is inner:
                adapted.check_state()
        if not self._in_parts():
            return checkpoint.full_optimizer_state(inner, keep=self.is_global_zero)
        return checkpoint.named_optimizer_state(inner, module)

    @override
    def load_optimizer_state_dict(self, checkpoint_: Mapping[str, Any]) -> None:
        """Load the optimizer states in order, each rank its shards; surplus states or optimizers are skipped.

        Lightning's placeholder for a missing optimizer is ignored, both in the checkpoint and among the optimizers.

        Raises:
            PlanError: a state is of another kind of optimizer, or of other parameters.
        """
        kinds = dict(enumerate(checkpoint.saved_kinds(checkpoint_) or ()))
        saved = [
            (state, kinds.get(number, ()))
            for number, state in enumerate(checkpoint_["optimizer_states"])
            if "param_groups" in state
        ]
        optimizers = [optimizer for optimizer in self.optimizers if optimizer.param_groups]
        if len(saved) != len(optimizers):
            rank_zero_warn(
                f"The checkpoint has the states of {len(saved)} optimizers and configure_optimizers made"
                f" {len(optimizers)}: the first {min(len(saved), len(optimizers))} are loaded; others of the module"
                " start anew, others of the checkpoint are left out."
            )
        for optimizer, (state, own) in zip(optimizers, saved, strict=False):
            checkpoint.load_optimizer_state(
                optimizer, state, self._module(), kinds=own, memory_of=self._state_memory(optimizer)
            )
        for adapted in self._adapted:
            adapted.divide_state()

    def _state_memory(self, optimizer: Optimizer) -> checkpoint.StateMemory:
        """Return a function from a parameter and a state key to the memory to load into, or None for new memory."""
        return lambda parameter, key: None

    @override
    def save_checkpoint(self, checkpoint_: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint: a collective.

        If the module is sharded or state is offloaded to disk, the checkpoint is a directory to which each rank writes
        its shards. Otherwise it is a file; also with `save_full`, with a checkpoint plugin of the Trainer, and on file
        systems that are not mounted.

        Raises:
            PlanError: `filepath` is a folder that is not a checkpoint, or `storage_options` are given for a directory.
        """
        if not self._is_divided() and not self._in_parts():
            super().save_checkpoint(checkpoint_, filepath, storage_options)
            return
        checkpoint.tell_orders(checkpoint_, self._module())
        if self._saves_whole() or checkpoint.is_remote(filepath):
            super().save_checkpoint(self._whole_checkpoint(checkpoint_), filepath, storage_options)
            return
        if storage_options is not None:
            raise PlanError("storage_options are for checkpoints that are files; leave them out, or save_full=True.")
        optimizers = [checkpoint.kinds_of(optimizer) for optimizer in self.optimizers]
        checkpoint.save_directory(checkpoint_, Path(self.broadcast(str(filepath))), optimizers=optimizers)

    def _whole_checkpoint(self, checkpoint_: dict[str, Any]) -> dict[str, Any]:
        """Return `checkpoint_` with full tensors and optimizer states by parameter index: a collective."""
        found: dict[str, Any] = checkpoint.whole_everywhere(checkpoint_, keep=self.is_global_zero)
        if not self._saves_whole() and "optimizer_states" in found:
            states = [checkpoint.indexed_optimizer_state(state) for state in found["optimizer_states"]]
            found = {**found, "optimizer_states": states}
        return found
