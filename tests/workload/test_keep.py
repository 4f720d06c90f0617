"""What any object holds comes back, by the methods of Python's own types and within a limit of time."""

import random
import time
from collections import Counter, OrderedDict, UserDict, deque
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_largescale.workload.keep import keep


class Locked(dict):
    def update(self, *_, **__):
        raise RuntimeError("read only")

    clear = __setitem__ = update


class Short(list):
    def extend(self, _):
        raise RuntimeError("no more")

    def __iter__(self):
        return iter([])


class Meter:
    def __init__(self):
        self.total = 0


def keeping(value, change):
    """`value` as the attribute of a module, after `change` was undone."""
    module = nn.Module()
    module.value = value
    put_back = keep([module], None)
    change(module.value)
    for one in put_back:
        one()
    assert module.value is value
    return value


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (Counter(a=3, b=2), lambda value: value.update("ab")),
        (Locked(a=1), lambda value: dict.update(value, a=2, b=3)),
        (Short([1, 2]), lambda value: value.append(3)),
        (OrderedDict(a=1, b=2), lambda value: value.move_to_end("a")),
        ({1, 2}, lambda value: value.add(3)),
        (deque([1, 2], maxlen=2), lambda value: value.append(3)),
        (UserDict(a=1), lambda value: value.update(a=2)),
        ([[1], ({"a": [2]},)], lambda value: value[1][0]["a"].append(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers(value, change):
    content = repr(value)
    assert repr(keeping(value, change)) == content
    if isinstance(value, list):
        assert list.__len__(value) == 2


def test_what_did_not_change_is_not_touched():
    class Watched(dict):
        def __setitem__(self, *_):
            raise AssertionError

    assert keeping(Watched(a=1), lambda value: None) == {"a": 1}


def test_objects_and_modules_that_are_no_submodules():
    for value in (Meter(), SimpleNamespace(total=0), nn.Module()):
        value.total = 0
        keeping([value], lambda held: setattr(held[0], "total", 1))
        assert value.total == 0


class Slotted:
    __slots__ = ("empty", "seen", "total")

    def __init__(self):
        self.total, self.seen = 0, []


def test_attributes_in_slots():
    def change(value):
        value.total, value.empty = 1, 2
        value.seen.append(3)

    value = keeping(Slotted(), change)
    assert (value.total, value.seen, hasattr(value, "empty")) == (0, [], False)


def test_generators_and_arrays():
    state = {
        "numpy": numpy.random.default_rng(0),
        "legacy": numpy.random.RandomState(0),
        "torch": torch.Generator().manual_seed(0),
        "python": random.Random(0),
        "array": numpy.zeros(2),
    }

    def draw(value):
        value["array"] += 1
        return (
            value["numpy"].random(),
            value["legacy"].rand(),
            torch.rand(1, generator=value["torch"]).item(),
            value["python"].random(),
            value["array"].tolist(),
        )

    drawn = []
    keeping(state, lambda value: drawn.append(draw(value)))
    assert draw(state) == drawn[0]


def test_long_chains_and_large_data_take_little_time():
    class Rows(Dataset):
        def __init__(self):
            self.rows = [(index, str(index)) for index in range(300_000)]

    chain = None
    for _ in range(5000):
        chain = SimpleNamespace(chain=chain, seen=[])
    rows = Rows()
    start = time.process_time()
    keeping([chain, rows, rows.rows], lambda value: chain.chain.seen.append(1))
    assert chain.chain.seen == []
    assert time.process_time() - start < 1.0
