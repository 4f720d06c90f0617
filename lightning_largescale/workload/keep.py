"""Record what modules and objects hold, at any depth, and restore it.

Changes are undone with the methods of Python's built-in types: a subclass may forbid its own methods, or count calls.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from types import MemberDescriptorType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

# Packages whose objects do not hold a step's own state, and hold much else (a trainer, a tokenizer).
_FOREIGN = {"torch", "lightning", "lightning_largescale", "numpy", "transformers", "tokenizers", "torchmetrics"}
# Classes of the standard library that users keep state in.
_PLAIN = (SimpleNamespace, Namespace, UserDict, UserList)
# Limit on the objects below attributes that are searched, nearest first: a step's own state is never so large, and the
# search takes a tenth of a second. Larger structures are data, which steps only read. Of a collection longer than
# `_LONGEST` the items are kept, but not their content.
MOST_OBJECTS = 20_000
_LONGEST = 10_000
# The largest NumPy array that is kept (bytes), since it has to be copied.
_LARGEST_ARRAY = 2**20
_ATOMS = (str, int, float, complex, bytes, type(None), torch.Tensor, type, ModuleType)


def keep(
    modules: Sequence[nn.Module], held: Any, *, most: int = MOST_OBJECTS, data: bool = False
) -> list[Callable[[], None]]:
    """Return functions that restore `modules`, and all that they and `held` hold now; one function for each object.

    Args:
        modules: the modules; all their attributes are kept.
        held: a further object to keep, such as a batch.
        most: the limit on the objects below these that are searched.
        data: search datasets too.
    """
    atoms = _ATOMS if data else (*_ATOMS, Dataset)
    kept: list[Callable[[], None]] = []
    seen = {id(module) for module in modules}
    waiting: deque[Any] = deque()
    for module in modules:
        kept.append(_Attributes(module).put_back)
        waiting.extend(_compound(vars(module).values(), seen, atoms))
    waiting.extend(_compound([held], seen, atoms))
    # All attributes of modules are searched, however many there are: they hold the parameters.
    left = len(waiting) + most
    while waiting and left:
        left -= 1
        value = waiting.popleft()
        keeper = _held_by(value)
        if keeper is not None:
            kept.append(keeper.put_back)
        items = _items(value)
        if len(items) <= _LONGEST and len(waiting) < left:
            waiting.extend(_compound(items, seen, atoms))
    return kept


def random_state() -> tuple[Any, ...]:
    """Return the random states of torch, its CUDA devices if initialized, Python, and NumPy if loaded."""
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy else None


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore the generators to a `state` that `random_state` returned."""
    cpu, cuda, python, for_numpy = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if for_numpy is not None:
        sys.modules["numpy"].random.set_state(for_numpy)


def _compound(values: Iterable[Any], seen: set[int], atoms: tuple[type, ...]) -> list[Any]:
    """Return the `values` that are not of `atoms` and not in `seen`, and add them to `seen`."""
    found: list[Any] = []
    for value in values:
        if not isinstance(value, atoms) and id(value) not in seen:
            seen.add(id(value))
            found.append(value)
    return found


def _items(value: Any) -> list[Any]:
    """Return the objects that `value` holds."""
    if isinstance(value, dict):
        return list(dict.values(value))
    if isinstance(value, (list, tuple, set, deque)):
        return _content(value)
    return [*getattr(value, "__dict__", {}).values(), *_in_slots(value).values()] if _is_users(value) else []


def _held_by(value: Any) -> Any:
    """Return the keeper of the content of `value`; None if there is nothing to keep."""
    if isinstance(value, dict):
        return _Dict(value)
    if isinstance(value, (list, set, deque)):
        return _Collection(value)
    if _is_users(value):
        return _Attributes(value)
    numpy = sys.modules.get("numpy")
    if isinstance(value, (random.Random, torch.Generator)) or (
        numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))
    ):
        return _Generator(value)
    if numpy is not None and type(value) is numpy.ndarray and value.nbytes <= _LARGEST_ARRAY:
        return _Array(value)
    return None


def _is_users(value: Any) -> bool:
    """Return whether a step may keep state in attributes of `value`: a module, or an object of a user's class."""
    if isinstance(value, (nn.Module, Dataset, *_PLAIN)):
        return True
    package = type(value).__module__.partition(".")[0]
    if package in _FOREIGN or package in sys.stdlib_module_names:
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or bool(_slots(type(value)))


def _slots(kind: type) -> list[MemberDescriptorType]:
    return [member for base in kind.__mro__ for member in vars(base).values() if type(member) is MemberDescriptorType]


def _in_slots(holder: Any) -> dict[MemberDescriptorType, Any]:
    """Return the values in the slots of `holder`; empty slots are left out."""
    held: dict[MemberDescriptorType, Any] = {}
    for slot in _slots(type(holder)):
        # An empty slot can only be recognized by its AttributeError.
        with contextlib.suppress(AttributeError):
            held[slot] = slot.__get__(holder)
    return held


def _content(held: Any) -> list[Any]:
    kind = next(kind for kind in (list, tuple, set, deque) if isinstance(held, kind))
    return list(kind.__iter__(held))


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    """Return whether both hold the same objects in order; compared by identity, since `==` of tensors gives no bool."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


class _Dict:
    """The items of a dict, in order."""

    __slots__ = ("_held", "_keys", "_kind", "_values")

    def __init__(self, held: dict[Any, Any]) -> None:
        self._held = held
        # Python's dict methods do not keep an OrderedDict's order.
        self._kind: Any = OrderedDict if isinstance(held, OrderedDict) else dict
        self._keys, self._values = list(self._kind.keys(held)), list(self._kind.values(held))

    def put_back(self) -> None:
        kind, held = self._kind, self._held
        if _same(kind.keys(held), self._keys) and _same(kind.values(held), self._values):
            return
        kind.clear(held)
        for key, value in zip(self._keys, self._values, strict=True):
            kind.__setitem__(held, key, value)


class _Attributes:
    """The attributes of a module or an object, those in slots included."""

    __slots__ = ("_before", "_holder", "_in_slots")

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        self._before = dict(getattr(holder, "__dict__", {}))
        self._in_slots = _in_slots(holder)

    def put_back(self) -> None:
        now = getattr(self._holder, "__dict__", {})
        if not (_same(now, self._before) and _same(now.values(), self._before.values())):
            now.clear()
            now.update(self._before)
        now = _in_slots(self._holder)
        for slot in now.keys() - self._in_slots.keys():
            slot.__delete__(self._holder)
        for slot, value in self._in_slots.items():
            if now.get(slot) is not value:
                slot.__set__(self._holder, value)


class _Collection:
    """The items of a list, a set or a deque."""

    __slots__ = ("_before", "_held")

    def __init__(self, held: list[Any] | set[Any] | deque[Any]) -> None:
        self._held, self._before = held, _content(held)

    def put_back(self) -> None:
        held = self._held
        if _same(_content(held), self._before):
            return
        if isinstance(held, list):
            list.__setitem__(held, slice(None), self._before)
        elif isinstance(held, set):
            set.clear(held)
            set.update(held, self._before)
        else:
            deque.clear(held)
            deque.extend(held, self._before)


class _Array:
    """The elements of a NumPy array."""

    def __init__(self, held: Any) -> None:
        self._held, self._before = held, held.copy()

    def put_back(self) -> None:
        if self._held.flags.writeable:
            self._held[...] = self._before


class _Generator:
    """The state of a generator of random numbers: Python's, torch's or NumPy's."""

    def __init__(self, held: Any) -> None:
        self._held = held
        self._before = self._now()

    def put_back(self) -> None:
        if isinstance(self._held, random.Random):
            self._held.setstate(self._before)
        elif hasattr(self._held, "bit_generator"):
            self._held.bit_generator.state = self._before
        else:
            self._held.set_state(self._before)

    def _now(self) -> Any:
        if isinstance(self._held, random.Random):
            return self._held.getstate()
        return self._held.bit_generator.state if hasattr(self._held, "bit_generator") else self._held.get_state()
