"""Leave a module as it was: its attributes, the tensors it holds and the random number generators."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat

# Packages whose objects a step does not keep its own state in, and that hold much (a trainer, a tokenizer).
_FOREIGN = {"torch", "lightning", "lightning_largescale", "numpy", "transformers", "tokenizers", "torchmetrics"}


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """What happens to the attributes of `module` and its submodules inside is undone on leaving, whatever happens.

    Attributes are put back, and the content of lists, dicts, sets, deques and plain objects (meters) below them, at any
    depth. Random numbers drawn inside were never drawn.
    """
    seen = {id(child) for child in module.modules()}
    kept = [_Kept(child, seen) for child in module.modules()]
    random_state = _random_state()
    try:
        yield
    finally:
        for one in kept:
            one.put_back()
        _set_random_state(random_state)


def swap_tensors(
    module: nn.Module, parameter: Callable[[torch.Tensor], torch.Tensor], buffer: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Put other tensors in place of the parameters and buffers of `module`; call under `untouched`.

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


class _Kept:
    """The attributes of one module, and the content of its containers."""

    def __init__(self, module: nn.Module, seen: set[int]) -> None:
        self._module = module
        self._attributes = dict(module.__dict__)
        containers = _containers(self._attributes.values(), seen)
        self._contents = [(held, list(held.items()) if isinstance(held, dict) else list(held)) for held in containers]

    def put_back(self) -> None:
        self._module.__dict__.clear()
        self._module.__dict__.update(self._attributes)
        for container, content in self._contents:
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(content)
            else:
                container.extend(content)


def _containers(values: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """Every container at or below `values`, and the attributes of every object of the user's there; each once."""
    for value in values:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, dict, set, deque)):
            yield value
            yield from _containers(list(value.values()) if isinstance(value, dict) else list(value), seen)
        elif isinstance(value, tuple):
            yield from _containers(value, seen)
        elif _is_users(value):
            yield value.__dict__
            yield from _containers(list(value.__dict__.values()), seen)


def _is_users(value: Any) -> bool:
    """Whether `value` is an object of a class that a user wrote: not Python's, torch's or Lightning's, and no class."""
    if isinstance(value, (type, ModuleType, nn.Module)) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in _FOREIGN and package not in sys.stdlib_module_names


def _random_state() -> tuple[Any, ...]:
    """Of torch, of its CUDA devices where they are in use, of Python, and of NumPy where it is loaded."""
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy else None


def _set_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, python, for_numpy = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if for_numpy is not None:
        sys.modules["numpy"].random.set_state(for_numpy)
