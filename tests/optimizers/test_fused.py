from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_largescale.optimizers.fused import vectorized


class Based(torch.optim.SGD):
    """Whose step may be anything."""


@pytest.fixture
def parameters():
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


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
