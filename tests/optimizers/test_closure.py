from __future__ import annotations

import pytest
import torch

from lightning_largescale.optimizers.closure import closure_first


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
