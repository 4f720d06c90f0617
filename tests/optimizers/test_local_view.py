from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.optimizers.local_view import LocalView, bare_step, set_options


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


def test_a_view_is_stepped_on_in_place_of_the_parameters(parameters):
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.5, momentum=0.9)
    optimizer.step()
    groups, state = [group["params"] for group in optimizer.param_groups], optimizer.state[parameters[1]]
    view = LocalView(optimizer)
    # The first one stays as it is.
    view.hold_all(lambda tensor: tensor if tensor.shape == (2,) else tensor[:2])
    first, second = (one for group in optimizer.param_groups for one in group["params"])
    assert first is parameters[0]
    assert second.shape == second.grad.shape == optimizer.state[second]["momentum_buffer"].shape == (2,)
    assert parameters[1] not in optimizer.state
    optimizer.step()
    seen = []
    view.end(lambda *given: seen.append(given[:2]) or given[2])
    assert seen == [(parameters[1], "momentum_buffer")]
    assert [group["params"] for group in optimizer.param_groups] == groups
    assert optimizer.state[parameters[1]] is state
    # The last element was stepped on once.
    assert parameters[1].tolist() == pytest.approx([1 - 0.5 - 0.95, 1 - 0.5 - 0.95, 0.5])


def test_values_that_an_optimizer_puts_elsewhere_are_taken_back(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    view = LocalView(optimizer)
    view.hold_as(0, parameters[1], lambda tensor: tensor.view_as(tensor))
    (part,) = optimizer.param_groups[0]["params"]
    part.data = torch.full((3,), 7.0)
    view.end()
    assert parameters[1].tolist() == [7.0] * 3


def test_after_a_step_that_raised_a_view_leaves_nothing(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    optimizer.step()
    view = LocalView(optimizer)
    view.hold(0, parameters[0], torch.ones(1), torch.ones(1), {"momentum_buffer": torch.ones(1)})
    view.close()
    assert [*optimizer.state] == optimizer.param_groups[0]["params"] == parameters
