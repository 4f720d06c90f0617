"""Replacements of a module's forward, nested and restored in any order."""

import copy
import itertools

import pytest
from torch import nn

from lightning_largescale.forward import Forward, replacements


class Named(nn.Module):
    def forward(self, x):
        return [*x, "own"]


class First(Forward):
    def __init__(self, module):
        super().__init__(module)
        self.handles.append(module.register_forward_pre_hook(lambda *_: None))

    def __call__(self, x):
        return self.original([*x, "First"])


class Third(Forward):
    def __call__(self, x):
        return self.original([*x, "Third"])


KINDS = {"First": First, "Third": Third}


def given(x):
    return [*x, "given"]


def module_of(own):
    module = nn.Sequential(Named())
    if own:
        module[0].forward = given
    return module, [given([])[0] if own else "own"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", [*itertools.permutations(KINDS)])
def test_the_order_of_restoration_does_not_matter(order, own):
    module, last = module_of(own)
    for kind in KINDS.values():
        kind(module[0]).replace()
    assert module[0]([]) == ["Third", "First", *last]
    left = [*reversed(KINDS)]
    for name in order:
        KINDS[name].restore(module)
        left.remove(name)
        assert module[0]([]) == [*left, *last]
    assert ("forward" in vars(module[0])) == own
    if own:
        assert module[0].forward is given


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_what_is_replaced_twice_is_restored_once(own, between):
    module, last = module_of(own)
    for _ in range(2):
        First(module[0]).replace()
        if between:
            Third(module[0]).replace()
    assert module[0]([]).count("First") == 1
    First.restore(module)
    First.restore(module)
    Third.restore(module)
    assert module[0]([]) == last
    assert ("forward" in vars(module[0])) == own


def test_hooks_of_a_replacement_go_with_it():
    module, _ = module_of(False)
    First(module[0]).replace()
    Third(module[0]).replace()
    assert module[0]._forward_pre_hooks
    First.restore(module)
    assert not module[0]._forward_pre_hooks
    assert [type(one) for one in replacements(module[0])] == [Third]


def test_a_copy_computes_with_its_own_module():
    module, last = module_of(False)
    First(module[0]).replace()
    made = copy.deepcopy(module)
    First.restore(module)
    assert made[0]([]) == ["First", *last]
    assert made[0].forward.original.__self__ is made[0]
    First.restore(made)
    assert "forward" not in vars(made[0])
