"""The fused kernel of an optimizer's step on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Optimizers of torch that have a fused kernel on the CPU.
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def vectorized(optimizer: Optimizer, options: Mapping[str, Any], *, floating: bool = True) -> dict[str, Any]:
    """Return `options` of a group for a step on the CPU.

    They select the fused kernel if `optimizer` is one of torch's own that has one and the user has left the choice of
    the implementation open.

    Args:
        optimizer: the optimizer of the group.
        options: the group without its parameters.
        floating: whether its parameters are floating-point numbers.

    Source: torch.optim, Algorithms ("fused" of Adam, AdamW, SGD and Adagrad).
    """
    given = dict(options)
    if isinstance(rate := given.get("lr"), Tensor):
        given["lr"] = rate.cpu()
    chosen = given.get("foreach") is not None or given.get("differentiable") or given.get("capturable")
    # With a momentum, the kernel takes no parameter whose first gradient comes later than those of others.
    known = type(optimizer) in FUSED and not given.get("momentum")
    if not known or chosen or given.get("fused", False) is not None or not floating:
        return given
    return {**given, "foreach": False, "fused": True}
