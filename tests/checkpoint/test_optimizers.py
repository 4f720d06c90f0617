"""The state of optimizers by names, and of optimizers that are others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Adamax, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from lightning_largescale.checkpoint.optimizers import (
    indexed_optimizer_state,
    kinds_of,
    load_optimizer_state,
    named_optimizer_state,
)
from lightning_largescale.errors import PlanError


def stepped(kind=AdamW, order=1, split=1, **options):
    """A module and an optimizer of its parameters, in their order or the other, that has stepped once."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    parameters = [*module.parameters()][::order]
    groups = [{"params": parameters[:split]}, {"params": parameters[split:], "lr": 0.5}]
    optimizer = kind(groups, lr=0.1, **options)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_names_and_indices():
    module, optimizer = stepped()
    named = named_optimizer_state(optimizer, module)
    assert list(named["state"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [group["params"] for group in named["param_groups"]] == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]
    again, expected = indexed_optimizer_state(named), optimizer.state_dict()
    assert again["param_groups"] == expected["param_groups"]
    assert torch.equal(again["state"][2]["exp_avg"], expected["state"][2]["exp_avg"])


def test_names_find_parameters_in_another_order():
    module, optimizer = stepped(split=2)
    other, target = stepped(split=2)
    target.param_groups[1]["params"].reverse()
    target.state.clear()
    load_optimizer_state(target, named_optimizer_state(optimizer, module), other)
    for parameter, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(target.state[same]["exp_avg"], optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("named", [True, False])
def test_an_optimizer_of_another_kind(named):
    module, optimizer = stepped(SGD, momentum=0.9)
    other, target = stepped(AdamW)
    state = named_optimizer_state(optimizer, module) if named else optimizer.state_dict()
    with pytest.raises(PlanError) as told:
        load_optimizer_state(target, state, other)
    assert "the checkpoint's optimizer has 'dampening', 'momentum', 'nesterov' and no " in str(told.value)
    assert "so it is no AdamW; make one of the same class" in str(told.value)


def test_kinds_with_the_same_state_and_schedulers():
    module, optimizer = stepped(Adam)
    OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    other, target = stepped(AdamW)
    load_optimizer_state(target, named_optimizer_state(optimizer, module), other)
    assert target.param_groups[0]["max_lr"] == 1.0


def test_kinds_by_name():
    module, optimizer = stepped(AdamW)
    other, target = stepped(Adamax)
    state = named_optimizer_state(optimizer, module)
    with pytest.raises(PlanError, match="optimizer is AdamW and this is Adamax; make one of the same class"):
        load_optimizer_state(target, state, other, kinds=kinds_of(optimizer))
    assert kinds_of(optimizer)[0] == "AdamW"

    class Own(AdamW):
        pass

    other, target = stepped(Own)
    load_optimizer_state(target, state, other, kinds=kinds_of(optimizer))


def test_other_groups():
    module, optimizer = stepped()
    other, target = stepped(split=2)
    with pytest.raises(PlanError, match=r"has parameter groups of \[1, 3\] parameters and this AdamW of \[2, 2\]"):
        load_optimizer_state(target, named_optimizer_state(optimizer, module), other)
    other, target = stepped(order=-1)
    with pytest.raises(PlanError, match=r"does not have '1.bias' in its parameter group 0; make the optimizer with"):
        load_optimizer_state(target, named_optimizer_state(optimizer, module), other)
