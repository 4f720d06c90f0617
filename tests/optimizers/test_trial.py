from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.optimizers.local_view import bare_step
from lightning_largescale.optimizers.trial import clone_of, in_words


class Wrapping(torch.optim.Optimizer):
    """Steps by another optimizer, and keeps lists of its parameters and of what is none."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.flat = [parameter for group in self.param_groups for parameter in group["params"]]
        self.names = ["one", "two"]

    def step(self, closure=None):
        return self.inner.step(closure)


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
