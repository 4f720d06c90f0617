"""A forward in the place of a module's own, for a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class Forward(ABC):
    """What `module` computes with once `replace` was called, until `restore`.

    The bound method is replaced, not the module: state_dict keys and isinstance checks stay the user's.

    Attributes:
        original: the forward in the place of which this one is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.original: Callable[..., Any] = module.forward
        self._module = module
        # It may have been set on the module itself, by the user or by another of these.
        self._was_set = "forward" in vars(module)

    def replace(self) -> None:
        """Let the module compute with it."""
        self._module.forward = self

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of the forward that it replaces."""

    @classmethod
    def restore(cls, root: nn.Module) -> None:
        """Give each module of `root` back the forward that one of this class replaced."""
        for module in root.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, cls):
                if forward._was_set:
                    module.forward = forward.original
                else:
                    del module.forward
