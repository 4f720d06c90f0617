"""Restore a module and a batch after a run: attributes, the tensors they hold and the random number generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat
from lightning_largescale.workload.keep import MOST_OBJECTS, keep, random_state, set_random_state


class Snapshot:
    """The content of a module and a batch at construction, restored after every run of a step.

    Attributes are kept, and the content of lists, dicts, sets, deques, small NumPy arrays, random number generators and
    plain objects (meters) below them, at any depth up to a limit on their number.

    Args:
        module: the module; its submodules are kept too.
        batch: the input of the step.
        most_objects: the limit on the number of objects.
    """

    def __init__(self, module: nn.Module, batch: Any = None, *, most_objects: int = MOST_OBJECTS) -> None:
        self._put_back = [*_kept_tensors(module), *keep(list(module.modules()), batch, most=most_objects)]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Undo all changes made inside on leaving, also after an error; random number generators are restored too."""
        before = random_state()
        try:
            yield
        finally:
            errors: list[Exception] = []
            for put_back in self._put_back:
                # Each object is restored even if another cannot be.
                try:
                    put_back()
                except Exception as error:
                    errors.append(error)
            set_random_state(before)
            if errors:
                raise errors[0]


def has_script(module: nn.Module) -> bool:
    """Return whether TorchScript compiled a part of `module`, which then runs outside Python and may read addresses."""
    return any(isinstance(child, torch.jit.ScriptModule) for child in module.modules())


def swap_tensors(
    module: nn.Module, parameter: Callable[[torch.Tensor], torch.Tensor], buffer: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Replace the parameters and buffers of `module` by other tensors; call within `Snapshot.untouched`.

    A tensor in several places stays one tensor. Attributes that are, or contain, a parameter or buffer are replaced too
    (the flat weights of recurrent layers).

    Args:
        module: The module.
        parameter: The function that makes the replacement of a parameter.
        buffer: The function that makes the replacement of a buffer.

    Returns:
        The new tensors by the id of the old.
    """
    new: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for held, make in zip(compat.own_tensors(child), (parameter, buffer), strict=True):
            for name, old in held.items():
                if old is not None:
                    if id(old) not in new:
                        new[id(old)] = make(old)
                    held[name] = new[id(old)]
    for child in module.modules():
        own = compat.own_tensors(child)
        for name, value in list(child.__dict__.items()):
            if not any(value is held for held in own):
                child.__dict__[name] = _replaced(value, new)
    return new


def _replaced(value: Any, new: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    if type(value) in (list, tuple) and any(id(item) in new for item in value):
        return type(value)([new.get(id(item), item) for item in value])
    if type(value) is dict and any(id(item) in new for item in value.values()):
        return {key: new.get(id(item), item) for key, item in value.items()}
    return value


def _kept_tensors(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield functions that restore the tensors of TorchScript modules, which keep them outside Python's attributes."""
    for child in module.modules():
        for held in compat.own_tensors(child):
            if not isinstance(held, dict):
                yield _Tensors(held).put_back


class _Tensors:
    """The tensors in a mapping that is not a dict."""

    def __init__(self, held: Any) -> None:
        self._held, self._before = held, dict(held.items())

    def put_back(self) -> None:
        now = dict(self._held.items())
        for name, tensor in self._before.items():
            if now.get(name) is not tensor:
                self._held[name] = tensor
