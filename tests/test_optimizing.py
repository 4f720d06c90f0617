from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.optimizing import bare_step, clone_of, closure_first, hold, in_words, vectorized


class Wrapping(torch.optim.Optimizer):
    """Steps by another optimizer, and keeps lists of its parameters and of what is none."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.flat = [parameter for group in self.param_groups for parameter in group["params"]]
        self.names = ["one", "two"]

    def step(self, closure=None):
        return self.inner.step(closure)


class Based(torch.optim.SGD):
    """Whose step may be anything."""


@pytest.fixture
def parameters():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


def test_a_clone_steps_on_other_parameters_alone(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    optimizer.step()
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook of the optimizer was called"))
    other = nn.Parameter(torch.zeros(4))
    other.grad = torch.ones(4)
    clone = clone_of(optimizer, [{**optimizer.param_groups[0], "params": [other]}])
    bare_step(clone)()
    assert other.tolist() == [-0.5] * 4
    assert parameters[0].tolist() == [0.5] * 2
    assert list(clone.state) == [other]
    assert list(optimizer.state) == parameters
    assert type(clone) is torch.optim.SGD


def test_a_clone_leaves_the_defaults_of_the_optimizer(parameters):
    optimizer = Wrapping(parameters, lr=0.5)
    clone_of(optimizer, [{"params": []}])
    assert optimizer.defaults == {"lr": 0.5}


def test_a_clone_has_optimizers_and_lists_of_its_own(parameters):
    optimizer = Wrapping(parameters, lr=0.5)
    other = nn.Parameter(torch.zeros(4))
    other.grad = torch.ones(4)
    clone = clone_of(optimizer, [{**optimizer.param_groups[0], **optimizer.inner.param_groups[0], "params": [other]}])
    clone.step()
    assert other.tolist() == [-0.5] * 4
    assert clone.flat == [other]
    assert clone.inner is not optimizer.inner
    assert clone.names is optimizer.names
    assert optimizer.flat == parameters
    assert not optimizer.inner.state
    assert parameters[0].tolist() == [1.0] * 2


def test_a_clone_steps_without_what_a_scheduler_has_put_there(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    clone = clone_of(optimizer, [{**optimizer.param_groups[0], "params": []}])
    clone.step()
    assert "step" in vars(optimizer)
    assert "step" not in vars(clone)
    assert not getattr(optimizer, "_opt_called", False)
    optimizer.step()
    scheduler.step()


class Own(torch.optim.Optimizer):
    """That torch has not wrapped the step of."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]
        self.stepped = 0

    def step(self, closure=None):
        self.stepped += 1
        return closure and closure()


def test_the_bare_step_calls_no_hooks(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    bare_step(optimizer)()
    assert parameters[0].tolist() == [0.5] * 2
    assert called == []
    optimizer.step()
    assert called == ["before", "after"]
    own = Own(parameters)
    bare_step(own)()
    assert own.stepped == 1


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_evaluated_once_with_gradients_and_then_tells(by_name):
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 3.0

    optimizer = object()
    with torch.no_grad():
        if by_name:
            args, kwargs = closure_first((optimizer,), {"closure": closure, "other": 1})
            told = kwargs["closure"]
            assert (args, kwargs["other"]) == ((optimizer,), 1)
        else:
            args, kwargs = closure_first((optimizer, closure, 2), {"other": 1})
            told = args[1]
            assert (args[0], args[2], kwargs) == (optimizer, 2, {"other": 1})
    assert calls == [True]
    assert [told(), told()] == [3.0, 3.0]
    assert calls == [True]


@pytest.mark.parametrize(("args", "kwargs"), [((1,), {}), ((1, None), {}), ((1,), {"closure": None})])
def test_without_a_closure_arguments_are_as_they_were(args, kwargs):
    assert closure_first(args, kwargs) == (args, kwargs)


def test_a_group_has_what_it_is_given_and_nothing_else():
    group = {"params": [1], "lr": 2, "made": 3}
    same = group
    hold(group, {"lr": 1, "betas": (0, 1)}, [4])
    assert group is same
    assert list(group.items()) == [("params", [4]), ("lr", 1), ("betas", (0, 1))]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("One thing. And another."), "RuntimeError: One thing"),
        (ValueError("one line.\nanother"), "ValueError: one line"),
        (KeyError(), "KeyError: "),
    ],
)
def test_an_error_in_words(error, words):
    assert in_words(error) == words


@pytest.mark.parametrize(
    ("kind", "given", "fused"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.AdamW, {"fused": False}, False),
        (torch.optim.AdamW, {"foreach": True}, None),
        (torch.optim.AdamW, {"foreach": False}, None),
        (torch.optim.Adam, {"capturable": True}, None),
        (torch.optim.SGD, {}, True),
        # Its kernel takes no parameter whose first gradient comes after those of others.
        (torch.optim.SGD, {"momentum": 0.9}, None),
        (torch.optim.RMSprop, {}, "none"),
        (Based, {}, None),
    ],
)
def test_one_kernel_on_the_cpu_where_that_is_left_open(kind, given, fused, parameters):
    optimizer = kind(parameters, lr=0.1, **given)
    (group,) = optimizer.param_groups
    options = {key: value for key, value in group.items() if key != "params"}
    found = vectorized(optimizer, options)
    assert found.get("fused", "none") == fused
    assert {key: value for key, value in found.items() if key not in ("fused", "foreach")} == {
        key: value for key, value in options.items() if key not in ("fused", "foreach")
    }
    assert vectorized(optimizer, options, floating=False).get("fused", "none") == options.get("fused", "none")
