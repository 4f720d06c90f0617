"""ModuleValues: deferred construction, materialization and weight loading of a module's shards."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_largescale.checkpoint.weights import Weights, read_weights
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.deferred import DeferredError, Recording
from lightning_largescale.parallel.materialize import (
    Unmade,
    agree_on_values,
    fill,
    find_unmade,
    make_again,
    materialize,
)
from lightning_largescale.parallel.sharded import sharded_state
from lightning_largescale.parallel.stored import Stored
from lightning_largescale.precision import convert_module
from lightning_largescale.processes import Processes
from lightning_largescale.sample import random_state_now


class ModuleValues:
    """Values of a module that may be sharded: it is built without values, and its shards are materialized at setup.

    Args:
        strategy: Lightning's strategy, which has the module, its device and its precision plugin.
        processes: the ranks of the run.
        weights: the files of the module's weights; None if there are none.
        may_shard: returns whether the module may be sharded.
    """

    def __init__(
        self,
        strategy: ParallelStrategy,
        processes: Processes,
        weights: Weights | None,
        *,
        may_shard: Callable[[], bool],
    ) -> None:
        self._strategy, self._processes, self._weights, self._may_shard = strategy, processes, weights, may_shard
        # Recordings of the modules that were built or loaded without values.
        self._recordings: tuple[Recording, ...] = ()
        # The precision plugin that converted the module last.
        self._converted_by: Precision | None = None
        # The module into which the weight files were loaded.
        self._has_read: nn.Module | None = None
        self.forget()

    def forget(self) -> None:
        """Drop what was found for this module, so that the next one starts without it."""
        self._unmade: Unmade | None = None
        # State dict to load into a module without values, and whether to load it strictly.
        self._to_load: tuple[Mapping[str, Any], bool] | None = None
        # Names in the checkpoint's state dict, and values from the weight files for the other names.
        self._checkpointed: Collection[str] = ()
        self._to_read: Mapping[str, Tensor] = {}

    def close(self) -> None:
        """Forget the module, and the plugin that converted it."""
        self.forget()
        self._converted_by = None

    @property
    def _module(self) -> LightningModule:
        module = self._strategy.lightning_module
        assert module is not None
        return module

    @contextlib.contextmanager
    def init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Context in which `configure_model` and `Trainer.init_module` build the module.

        A module that may be sharded is built without values: each process materializes its shards at setup, with the
        numbers of a plain construction on the CPU. Other modules are built in DRAM, since they need not fit the device.

        Args:
            empty_init: The argument of `Trainer.init_module`. If true, the module is built without values there as
                well, for example since its weights are loaded next.
        """
        with self._strategy.precision_plugin.tensor_init_context():
            if not (self._may_shard() and (self._configures_model or empty_init)):
                yield
                return
            module = self._strategy.lightning_module if self._configures_model else None
            unmade = None if module is None else self.find_unmade()
            # Further construction of a recorded module belongs to the same recording.
            known = unmade.recordings if unmade is not None else []
            recording = known[0] if len(known) == 1 else Recording()
            if recording not in known:
                self._recordings = (*self._recordings, recording)
            before = [] if module is None else _attributes(module)
            draw_again = random_state_now()
            try:
                with recording.record():
                    yield
                if unmade is None and module is not None:
                    self._check_all_is_found(recording)
            except DeferredError as error:
                draw_again()
                if module is None:
                    raise
                rank_zero_info(
                    f"lightning_largescale: {error}, so configure_model is run in each process with all its values."
                )
                for part, attributes in before:
                    vars(part).clear()
                    vars(part).update(attributes)
                if unmade is not None:
                    self._make_all(unmade)
                module.configure_model()

    def _check_all_is_found(self, recording: Recording) -> None:
        """Raise a DeferredError if recorded tensors are kept where they cannot be found to be materialized."""
        unmade = self.find_unmade()
        found = [] if unmade is None else [*unmade.tensors.values(), *unmade.others]
        if recording.left_out(found):
            raise DeferredError("tensors are kept by what is no module, nor a list or dict that a module has")

    @property
    def _configures_model(self) -> bool:
        """Return whether the Trainer is running, so that the build is that of `configure_model`."""
        module = self._strategy.lightning_module
        return module is not None and module.trainer.state.status == TrainerStatus.RUNNING

    def defer_loading(self, checkpoint: Mapping[str, Any], *, strict: bool) -> bool:
        """Return whether the module has no values yet, so that its state dict is loaded when they are made.

        Args:
            checkpoint: the checkpoint to load.
            strict: whether to load strictly.
        """
        self._checkpointed = frozenset(checkpoint["state_dict"])
        if sharded_state(self._module) is not None or self.find_unmade() is None:
            return False
        self._to_load = checkpoint["state_dict"], strict
        return True

    def make_all(self) -> None:
        """Materialize the full module in this process if it was built without values."""
        if (unmade := self.find_unmade()) is not None:
            self._make_all(unmade)

    def _make_all(self, unmade: Unmade) -> None:
        with _told_in_time():
            materialize(self._module, unmade, torch.device("cpu"))
        self._drop_recordings(unmade)

    def _drop_recordings(self, unmade: Unmade) -> None:
        self._recordings = tuple(one for one in self._recordings if one not in unmade.recordings)

    def find_unmade(self) -> Unmade | None:
        """Return the module's tensors that have no values yet; None if there are none."""
        return find_unmade(self._module, self._recordings)

    def _recorded(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which changes to a module without values are recorded."""
        unmade = self.find_unmade()
        if unmade is None:
            return contextlib.nullcontext()
        if len(unmade.recordings) == 1:
            return unmade.recordings[0].record()
        # A change may concern tensors of several recordings, or of files.
        self._make_all(unmade)
        return contextlib.nullcontext()

    def convert(self) -> None:
        """Convert the module's parameters with the current precision plugin, once per plugin."""
        plugin = self._strategy.precision_plugin
        if sharded_state(self._module) is None and self._converted_by is not plugin:
            with self._recorded():
                convert_module(plugin, self._module)
            self._converted_by = plugin

    def prepare(self) -> None:
        """Find the module's unmaterialized tensors and the weights to read, before it is sharded.

        This is a collective if there are several ranks and the module may be sharded.
        """
        module = self._module
        # Before the module is changed, so that errors name the user's own class.
        weights = None if module is self._has_read else self._weights
        self._to_read = read_weights(module, weights, strict=module.strict_loading, without=self._checkpointed)
        self._checkpointed = ()
        self._unmade = self.find_unmade()
        if self._processes.has_peers and self._may_shard() and not agree_on_values(self._unmade):
            rank_zero_info(
                "lightning_largescale: configure_model draws or builds other tensors on some ranks, so each makes all"
                " of the module, and rank 0's counts."
            )
            if self._unmade is not None:
                self._make_all(self._unmade)
            self._unmade = None

    def make(self, storage: Callable[[Tensor], Tensor | None]) -> None:
        """Materialize the missing values of the module, sharded or not, and load weight files and the checkpoint.

        Args:
            storage: returns the memory in which to materialize this rank's shard of a parameter; None for new memory.
        """
        module, unmade = self._module, self._unmade
        state, strict = self._to_load or ({}, True)
        stored = {name: one for name, one in state.items() if isinstance(one, Stored)}
        if unmade is not None:
            given = [name for name in unmade.tensors if name in self._to_read or name in stored]
            with _told_in_time():
                materialize(
                    module, unmade, self._strategy.root_device, given=given, random=not given, memory_of=storage
                )
        fill(module, self._to_read)
        if self._to_load is not None:
            module.load_state_dict(state, strict=strict)
            # Hooks may leave out entries of the state dict, so that they were not read.
            left = [name for name, one in stored.items() if not one.was_read and name not in self._to_read]
            if unmade is not None and left:
                make_again(module, unmade, left)
        if unmade is not None:
            self._drop_recordings(unmade)
        self._has_read = module
        self.forget()


@contextlib.contextmanager
def _told_in_time() -> Generator[None, None, None]:
    """Turn a late `DeferredError` into a `PlanError` that names the remedy."""
    try:
        yield
    except DeferredError as error:
        raise PlanError(f"{error}, which showed only when the module was made; build it in __init__.") from error


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return each submodule of `module` with copies of its attributes and registries, to restore them later."""
    kinds = (dict, list, set)
    return [
        (part, {name: copy.copy(value) if isinstance(value, kinds) else value for name, value in vars(part).items()})
        for part in module.modules()
    ]
