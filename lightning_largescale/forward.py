"""Base class of temporary replacements of a module's forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class Forward(ABC):
    """A replacement of the forward of `module`, in use from `replace` until `restore`.

    The bound method is replaced, not the module: state_dict keys and isinstance checks stay the user's.

    Attributes:
        original: the forward that this one replaces.
    """

    def __init__(self, module: nn.Module) -> None:
        self.original: Callable[..., Any] = module.forward
        self._module = module
        # The user or another `Forward` may have set a forward on the module object itself.
        self._was_set = "forward" in vars(module)

    def replace(self) -> None:
        """Make the module use this forward."""
        self._module.forward = self

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward, with the arguments of the one that it replaces."""

    @classmethod
    def restore(cls, root: nn.Module) -> None:
        """Restore the forward of each module of `root` that an instance of this class replaced."""
        for module in root.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, cls):
                if forward._was_set:
                    module.forward = forward.original
                else:
                    del module.forward
