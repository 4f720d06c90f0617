"""BuildingStrategy: how a module comes to be, in each process its part alone: built, loaded, or made later."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC
from collections.abc import Generator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_largescale.checkpoint.weights import Weights, read_weights
from lightning_largescale.dividing import DividingStrategy
from lightning_largescale.parallel.deferred import DeferredError, Recording
from lightning_largescale.parallel.gather import sharded_state
from lightning_largescale.parallel.materialize import (
    Unmade,
    agree_on_values,
    find_unmade,
    materialize,
)
from lightning_largescale.sample import random_state_now


class BuildingStrategy(DividingStrategy, ABC):
    """Has `configure_model` run without values where the module may be divided, and gives them once it is."""

    _weights: Weights | None = None
    # Of what was built, or loaded, without values.
    _recording: Recording | None = None
    _unmade: Unmade | None = None
    # What a checkpoint has for a module without values, and whether all of it is to be there.
    _to_load: tuple[Mapping[str, Any], bool] | None = None
    # What the files that were given have for it.
    _to_read: Mapping[str, Tensor] = {}
    # The module that has its weights, of a checkpoint if not of the files that were given.
    _loaded: nn.Module | None = None

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
            self._recording = self._recording or Recording()
            module = self.lightning_module if self._configures_model else None
            before = None if module is None else _attributes(module)
            draw_again = random_state_now()
            try:
                with self._recording.record():
                    yield
            except DeferredError as error:
                draw_again()
                self._recording = None
                if module is None or before is None:
                    raise
                rank_zero_info(
                    f"lightning_largescale: {error}, so configure_model is run in each process with all its values."
                )
                vars(module).clear()
                vars(module).update(before)
                module.configure_model()

    @property
    def _configures_model(self) -> bool:
        """Whether the Trainer is under way, and so asks for `configure_model`."""
        module = self.lightning_module
        return module is not None and module.trainer.state.status == TrainerStatus.RUNNING

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's weights; into one without values once it has its parts."""
        module = self._module()
        self._loaded = module
        if sharded_state(module) is None and self._find_unmade() is not None:
            self._to_load = checkpoint["state_dict"], strict
            return
        super().load_model_state_dict(checkpoint, strict)

    def _find_unmade(self) -> Unmade | None:
        return find_unmade(self._module(), self._recording)

    def _recorded(self) -> contextlib.AbstractContextManager[None]:
        """Within, changes to a module without values are recorded."""
        if self._recording is None or self._find_unmade() is None:
            return contextlib.nullcontext()
        return self._recording.record()

    def _prepare_values(self) -> None:
        """Find what the module has no values of, before it is divided: a collective where there are others."""
        module = self._module()
        # Before anything is changed, so that what does not fit is told of the user's own class.
        weights = None if module is self._loaded else self._weights
        self._to_read = read_weights(module, weights, strict=module.strict_loading)
        self._unmade = self._find_unmade()
        if self._unmade is not None and self.has_peers and not agree_on_values(self._unmade):
            rank_zero_info(
                "lightning_largescale: configure_model draws or builds other tensors on some ranks, so each makes all"
                " of the module, and rank 0's counts."
            )
            materialize(module, self._unmade, torch.device("cpu"))
            self._unmade = self._recording = None

    def _make_values(self) -> None:
        """Give the module, divided or not, the values that it has not."""
        module, unmade = self._module(), self._unmade
        weights, self._to_read = self._to_read, {}
        if unmade is not None:
            loaded = {} if self._to_load is None else self._to_load[0]
            given = [name for name in unmade.tensors if name in weights or name in loaded]
            materialize(module, unmade, self.root_device, given=given, random=not given)
        self._loaded = module
        self._unmade = self._recording = None
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, stored in weights.items():
                tensors[name].copy_(stored)
        if self._to_load is not None:
            state, strict = self._to_load
            self._to_load = None
            module.load_state_dict(state, strict=strict)


def _attributes(module: LightningModule) -> dict[str, Any]:
    """What `module` has, and what it registers, to be put back."""
    kinds = (dict, list, set)
    return {name: copy.copy(value) if isinstance(value, kinds) else value for name, value in vars(module).items()}
