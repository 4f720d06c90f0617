"""Leave a module and a batch as they were: attributes, the tensors they hold and the random number generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat
from lightning_largescale.workload.keep import MOST_OBJECTS, keep, random_state, set_random_state


class Snapshot:
    """What a module and a batch hold now, looked through once, to be put back after every run of a step.

    Attributes are kept, and the content of lists, dicts, sets, deques, small NumPy arrays, generators of random numbers
    and plain objects (meters) below them, at any depth up to a limit on their number.

    Args:
        module: its submodules are kept too.
        batch: what the step is given.
        most_objects: the limit.
    """

    def __init__(self, module: nn.Module, batch: Any = None, *, most_objects: int = MOST_OBJECTS) -> None:
        self._put_back = [*_kept_tensors(module), *keep(list(module.modules()), batch, most=most_objects)]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What happens inside is undone on leaving, whatever happens; random numbers drawn inside were never drawn."""
        before = random_state()
        try:
            yield
        finally:
            errors: list[Exception] = []
            for put_back in self._put_back:
                # Each is put back even where another cannot be.
                try:
                    put_back()
                except Exception as error:
                    errors.append(error)
            set_random_state(before)
            if errors:
                raise errors[0]


def has_script(module: nn.Module) -> bool:
    """Whether TorchScript compiled a part of `module`, which then runs outside Python and may read addresses."""
    return any(isinstance(child, torch.jit.ScriptModule) for child in module.modules())


def swap_tensors(
    module: nn.Module, parameter: Callable[[torch.Tensor], torch.Tensor], buffer: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Put other tensors in place of the parameters and buffers of `module`; call while it is untouched.

    A tensor with several places stays one tensor. Attributes that are, or list, a parameter or buffer follow (the flat
    weights of recurrent layers).

    Returns:
        The new tensor by the id of the old.
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
    """What puts back the tensors of TorchScript modules, which keep them outside Python's attributes."""
    for child in module.modules():
        for held in compat.own_tensors(child):
            if not isinstance(held, dict):
                yield _Tensors(held).put_back


class _Tensors:
    """The tensors in a mapping that is no dict."""

    def __init__(self, held: Any) -> None:
        self._held, self._before = held, dict(held.items())

    def put_back(self) -> None:
        now = dict(self._held.items())
        for name, tensor in self._before.items():
            if now.get(name) is not tensor:
                self._held[name] = tensor
