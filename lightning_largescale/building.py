"""BuildingStrategy: how a module comes to be, in each process its part alone: built, loaded, or made later."""

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
from lightning_largescale.parallel.gather import sharded_state
from lightning_largescale.parallel.materialize import (
    Unmade,
    agree_on_values,
    fill,
    find_unmade,
    make_again,
    materialize,
)
from lightning_largescale.parallel.stored import Stored
from lightning_largescale.sample import random_state_now


class BuildingStrategy(DividingStrategy, ABC):
    """Has `configure_model` run without values where the module may be divided, and gives them once it is."""

    _weights: Weights | None = None
    # Of what was built, or loaded, without values.
    _recordings: tuple[Recording, ...] = ()
    _unmade: Unmade | None = None
    # What a checkpoint has for a module without values, and whether all of it is to be there.
    _to_load: tuple[Mapping[str, Any], bool] | None = None
    # Names that a checkpoint has for the module, and what the files that were given have for the others.
    _checkpointed: Collection[str] = ()
    _to_read: Mapping[str, Tensor] = {}
    # The module that has read these files.
    _has_read: nn.Module | None = None

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Where `configure_model` and `Trainer.init_module` build.

        A module that may be divided is built without values: each process makes its part of them at setup, with the
        numbers of a plain construction on the CPU. Another is built in DRAM, since it need not fit the device.

        Args:
            empty_init: of `Trainer.init_module`: true has the module built without values there as well, as for one
                whose weights are loaded next.
        """
        with self.precision_plugin.tensor_init_context():
            if not (self._may_divide and (self._configures_model or empty_init)):
                yield
                return
            module = self.lightning_module if self._configures_model else None
            unmade = None if module is None else self._find_unmade()
            # What goes on with a module that was recorded is of the same recording.
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
        """Raise a DeferredError where tensors were recorded that are in no place where they can be given values."""
        unmade = self._find_unmade()
        found = [] if unmade is None else [*unmade.tensors.values(), *unmade.others]
        if recording.left_out(found):
            raise DeferredError("tensors are kept by what is no module, nor a list or dict that a module has")

    @property
    def _configures_model(self) -> bool:
        """Whether the Trainer is under way, and so asks for `configure_model`."""
        module = self.lightning_module
        return module is not None and module.trainer.state.status == TrainerStatus.RUNNING

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's weights; into one without values once it has its parts."""
        self._checkpointed = frozenset(checkpoint["state_dict"])
        if sharded_state(self._module()) is None and self._find_unmade() is not None:
            self._to_load = checkpoint["state_dict"], strict
            return
        super().load_model_state_dict(checkpoint, strict)

    def make_all(self) -> None:
        """Give the module, where it has none, all of its values in this process."""
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
        """Within, changes to a module without values are recorded."""
        unmade = self._find_unmade()
        if unmade is None:
            return contextlib.nullcontext()
        if len(unmade.recordings) == 1:
            return unmade.recordings[0].record()
        # A change may be to what stands in several recordings, or in files.
        self._make_all(unmade)
        return contextlib.nullcontext()

    def _prepare_values(self) -> None:
        """Find what the module has no values of, before it is divided: a collective where it may be."""
        module = self._module()
        # Before anything is changed, so that what does not fit is told of the user's own class.
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
        """Give the module, divided or not, the values that it has not."""
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
            # Not all that a state has is taken where hooks leave some out.
            left = [name for name, one in stored.items() if not one.was_read and name not in self._to_read]
            if unmade is not None and left:
                make_again(module, unmade, left)
        if unmade is not None:
            self._drop_recordings(unmade)
        self._has_read = module
        self._forget_values()

    def _memory_of(self, parameter: Tensor) -> Tensor | None:
        """Where this rank's part of a parameter is to be made; None for memory of its own."""
        return None

    def _forget_values(self) -> None:
        """Leave nothing for the next module of what was found for this one."""
        self._unmade, self._to_load, self._to_read, self._checkpointed = None, None, {}, ()


@contextlib.contextmanager
def _told_in_time() -> Generator[None, None, None]:
    """Within, what shows only now that a construction cannot be deferred is said with what to do about it."""
    try:
        yield
    except DeferredError as error:
        raise PlanError(f"{error}, which showed only when the module was made; build it in __init__.") from error


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What all parts of `module` have, and what they register, to be put back."""
    kinds = (dict, list, set)
    return [
        (part, {name: copy.copy(value) if isinstance(value, kinds) else value for name, value in vars(part).items()})
        for part in module.modules()
    ]
