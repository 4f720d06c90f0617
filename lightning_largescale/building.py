"""BuildingStrategy: deferred construction, materialization and weight loading of a module's shards."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC
from collections.abc import Collection, Generator, Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_largescale.checkpoint.weights import Weights, read_weights
from lightning_largescale.dividing import DividingStrategy
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
from lightning_largescale.sample import random_state_now


class BuildingStrategy(DividingStrategy, ABC):
    """Strategy that builds a module that may be sharded without values and materializes its shards at setup."""

    _weights: Weights | None = None
    # Recordings of the modules that were built or loaded without values.
    _recordings: tuple[Recording, ...] = ()
    _unmade: Unmade | None = None
    # State dict to load into a module without values, and whether to load it strictly.
    _to_load: tuple[Mapping[str, Any], bool] | None = None
    # Names in the checkpoint's state dict, and values from the weight files for the other names.
    _checkpointed: Collection[str] = ()
    _to_read: Mapping[str, Tensor] = {}
    # The module into which the weight files were loaded.
    _has_read: nn.Module | None = None

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Context in which `configure_model` and `Trainer.init_module` build the module.

        A module that may be sharded is built without values: each process materializes its shards at setup, with the
        numbers of a plain construction on the CPU. Other modules are built in DRAM, since they need not fit the device.

        Args:
            empty_init: The argument of `Trainer.init_module`. If true, the module is built without values there as
                well, for example since its weights are loaded next.
        """
        with self.precision_plugin.tensor_init_context():
            if not (self._may_divide and (self._configures_model or empty_init)):
                yield
                return
            module = self.lightning_module if self._configures_model else None
            unmade = None if module is None else self._find_unmade()
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
        unmade = self._find_unmade()
        found = [] if unmade is None else [*unmade.tensors.values(), *unmade.others]
        if recording.left_out(found):
            raise DeferredError("tensors are kept by what is no module, nor a list or dict that a module has")

    @property
    def _configures_model(self) -> bool:
        """Return whether the Trainer is running, so that the build is that of `configure_model`."""
        module = self.lightning_module
        return module is not None and module.trainer.state.status == TrainerStatus.RUNNING

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's weights; if it has no values yet, defer loading until its shards are materialized."""
        self._checkpointed = frozenset(checkpoint["state_dict"])
        if sharded_state(self._module()) is None and self._find_unmade() is not None:
            self._to_load = checkpoint["state_dict"], strict
            return
        super().load_model_state_dict(checkpoint, strict)

    def make_all(self) -> None:
        """Materialize the full module in this process if it was built without values."""
        if (unmade := self._find_unmade()) is not None:
            self._make_all(unmade)

    def _make_all(self, unmade: Unmade) -> None:
        with _told_in_time():
            materialize(self._module(), unmade, torch.device("cpu"))
        self._drop_recordings(unmade)

    def _drop_recordings(self, unmade: Unmade) -> None:
        self._recordings = tuple(one for one in self._recordings if one not in unmade.recordings)

    def _find_unmade(self) -> Unmade | None:
        return find_unmade(self._module(), self._recordings)

    def _recorded(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which changes to a module without values are recorded."""
        unmade = self._find_unmade()
        if unmade is None:
            return contextlib.nullcontext()
        if len(unmade.recordings) == 1:
            return unmade.recordings[0].record()
        # A change may concern tensors of several recordings, or of files.
        self._make_all(unmade)
        return contextlib.nullcontext()

    def _prepare_values(self) -> None:
        """Find the module's unmaterialized tensors and the weights to read, before it is sharded.

        This is a collective if there are several ranks and the module may be sharded.
        """
        module = self._module()
        # Before the module is changed, so that errors name the user's own class.
        weights = None if module is self._has_read else self._weights
        self._to_read = read_weights(module, weights, strict=module.strict_loading, without=self._checkpointed)
        self._checkpointed = ()
        self._unmade = self._find_unmade()
        if self.has_peers and self._may_divide and not agree_on_values(self._unmade):
            rank_zero_info(
                "lightning_largescale: configure_model draws or builds other tensors on some ranks, so each makes all"
                " of the module, and rank 0's counts."
            )
            if self._unmade is not None:
                self._make_all(self._unmade)
            self._unmade = None

    def _make_values(self) -> None:
        """Materialize the missing values of the module, sharded or not, and load weight files and the checkpoint."""
        module, unmade = self._module(), self._unmade
        state, strict = self._to_load or ({}, True)
        stored = {name: one for name, one in state.items() if isinstance(one, Stored)}
        if unmade is not None:
            given = [name for name in unmade.tensors if name in self._to_read or name in stored]
            with _told_in_time():
                materialize(module, unmade, self.root_device, given=given, random=not given, memory_of=self._memory_of)
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
        self._forget_values()

    def _memory_of(self, parameter: Tensor) -> Tensor | None:
        """Return the memory in which to materialize this rank's shard of a parameter; None for new memory."""
        return None

    def _forget_values(self) -> None:
        """Drop what was found for this module, so that the next one starts without it."""
        self._unmade, self._to_load, self._to_read, self._checkpointed = None, None, {}, ()


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
