from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.optimizers.local_view import bare_step, set_options


@pytest.fixture
def parameters():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


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


def test_a_group_has_what_it_is_given_and_nothing_else():
    group = {"params": [1], "lr": 2, "made": 3}
    same = group
    set_options(group, {"lr": 1, "betas": (0, 1)})
    assert group is same
    assert list(group.items()) == [("params", [1]), ("lr", 1), ("betas", (0, 1))]
