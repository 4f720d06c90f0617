"""Techniques: hooks are called in order, closed in reverse, and only where a technique implements them."""

from __future__ import annotations

import contextlib

import pytest

from lightning_largescale.run import Toggled
from lightning_largescale.strategy import TECHNIQUES, LargeScaleStrategy
from lightning_largescale.technique import Technique, Techniques


class Logged(Technique):
    """Logs its hooks by its name."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self):
        self.log.append(f"{self.name} prepares")

    def close(self):
        self.log.append(f"{self.name} closes")
        if self.name == "failing":
            raise ValueError(self.name)

    @contextlib.contextmanager
    def update(self):
        self.log.append(f"into {self.name}")
        yield self.name
        self.log.append(f"out of {self.name}")

    def around_step(self, stage, step):
        return f"{self.name}({step})"

    def storage(self, parameter):
        return None if self.name == "outer" else f"memory of {self.name}"


class Quiet(Logged):
    prepare = Technique.prepare


def of(log, *names):
    return Techniques(Logged(name, log) for name in names)


def test_hooks_are_called_in_order_and_closed_in_reverse():
    log = []
    both = of(log, "outer", "inner")
    both.each(Technique.prepare)
    with both.all(Technique.update) as values:
        log.append(values)
    both.each_reversed(Technique.close)
    assert log == [
        *("outer prepares", "inner prepares"),
        *("into outer", "into inner", ["outer", "inner"], "out of inner", "out of outer"),
        *("inner closes", "outer closes"),
    ]


def test_a_value_goes_through_all_and_the_first_answer_counts():
    both = of([], "outer", "inner")
    assert both.chain(Technique.around_step, "training_step", value="step") == "inner(outer(step))"
    assert both.first(Technique.storage, None) == "memory of inner"
    assert Techniques().first(Technique.storage, None) is None


def test_a_technique_that_fails_to_close_leaves_none_open():
    log = []
    with pytest.raises(ValueError, match="failing"):
        of(log, "outer", "failing").each_reversed(Technique.close)
    assert log == ["failing closes", "outer closes"]


def test_a_hook_that_is_not_implemented_is_not_called():
    log = []
    Techniques([Quiet("quiet", log), Logged("other", log)]).each(Technique.prepare)
    assert log == ["other prepares"]


def test_a_toggled_context_is_left_with_its_step():
    log = []
    clipping = Toggled(lambda: Logged("clip", log).update())
    clipping.enter()
    assert log == []
    with clipping.step():
        clipping.enter()
        with clipping.step():
            clipping.enter()
            clipping.leave()
        log.append("the outer step goes on")
    clipping.leave()
    assert log == ["into clip", "into clip", "out of clip", "the outer step goes on", "out of clip"]


def test_the_strategy_is_one_class_and_each_technique_stands_once_in_its_table():
    from lightning.pytorch.strategies import ParallelStrategy

    from lightning_largescale.auto import LargeScaleAutoStrategy

    assert LargeScaleStrategy.__bases__ == (ParallelStrategy,)
    assert LargeScaleAutoStrategy.__bases__ == (LargeScaleStrategy,)
    assert len(set(TECHNIQUES)) == len(TECHNIQUES)
    assert all(technique.__base__ is Technique for technique in TECHNIQUES)
