"""Base class of temporary replacements of a module's forward."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class Forward(ABC):
    """A replacement of the forward of `module`, in use from `replace` until `restore`.

    The bound method is replaced, not the module: state_dict keys and isinstance checks stay the user's. Replacements of
    several classes may be nested, each calling the one before, and restored in any order.

    Attributes:
        original: the forward that this one replaces.
    """

    original: Callable[..., Any]

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Of hooks that are removed with this forward.
        self.handles: list[Any] = []

    def replace(self) -> None:
        """Make the module use this forward, in place of an earlier one of the same class."""
        self._remove_from(self._module)
        # The user or another `Forward` may have set a forward on the module object itself.
        self._was_set = "forward" in vars(self._module)
        self.wrap(self._module.forward)
        self._module.forward = self

    def wrap(self, original: Callable[..., Any]) -> None:
        """Compute with `original` from now on."""
        self.original = original

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward, with the arguments of the one that it replaces."""

    @classmethod
    def restore(cls, root: nn.Module) -> None:
        """Remove the replacements of this class from all modules of `root`; those of other classes stay."""
        for module in root.modules():
            cls._remove_from(module)

    @classmethod
    def _remove_from(cls, module: nn.Module) -> None:
        every = [*replacements(module)]
        removed = [one for one in every if isinstance(one, cls)]
        if not removed:
            return
        kept = [one for one in every if not isinstance(one, cls)]
        first, was_set = every[-1].original, every[-1]._was_set
        for hook in itertools.chain.from_iterable(one.handles for one in removed):
            hook.remove()
        for outer, inner in itertools.pairwise([*kept, None]):
            assert outer is not None
            if (original := inner or first) is not outer.original:
                outer.wrap(original)
        if kept:
            module.forward, kept[-1]._was_set = kept[0], was_set
        elif was_set:
            module.forward = first
        else:
            del module.forward


def replacements(module: nn.Module) -> Iterator[Forward]:
    """Yield the replacements of the forward of `module`, the one that is called first."""
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        yield forward
        forward = forward.original
