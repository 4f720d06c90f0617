"""Gradient clipping by the norm of the whole model's gradient, wherever its parts are.

torch.nn.utils.clip_grad_norm_ refuses a mix of DTensors and plain tensors, and DTensors on different meshes.

Source: Pascanu et al. 2013, "On the difficulty of training Recurrent Neural Networks", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

# As torch.nn.utils.clip_grads_with_norm_ has it, so that numbers are those of a plain run.
_EPSILON = 1e-6


def clip_gradients_by_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of `parameters` in place so that their joint 2-norm over all ranks is at most `max_norm`.

    A collective where there are DTensors. Plain gradients must be equal on all ranks.

    Returns:
        The norm before clipping, shape (), a plain tensor equal on all ranks.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return clip_grad_norm_(parameters, max_norm)
    norms = [_whole(get_total_norm(group)) for group in _by_mesh(gradients)]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    # Multiplying by a clamped coefficient rather than branching avoids waiting for the device.
    coefficient = torch.clamp(max_norm / (total + _EPSILON), max=1.0)
    for gradient in gradients:
        _local(gradient).mul_(coefficient.to(gradient.device))
    return total


def clip_gradients_by_value(parameters: Iterable[Tensor], max_value: float) -> None:
    """Clamp every element of the gradients of `parameters` to [-max_value, max_value] in place."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if any(isinstance(parameter.grad, DTensor) for parameter in parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                _local(parameter.grad).clamp_(-max_value, max_value)
    elif parameters:
        clip_grad_value_(parameters, max_value)


def _by_mesh(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Gradients that one norm can be taken of, in an order that is the same on all ranks."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    return list(groups.values())


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
