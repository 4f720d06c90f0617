"""Temporary replacement of an optimizer's parameters and state for a step.

The user's optimizer and its groups, which schedulers refer to, stay the same objects: only their tensors are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer


class Exchange:
    """Replacement of an optimizer's parameters, gradients and state by other tensors, and its reversal.

    Args:
        optimizer: The optimizer; between `begin` and `end` it may step, without evaluating the loss.
        part: Returns the replacement of a parameter, gradient or state tensor, which shares its storage or is the same.
        to_whole: The reverse for a state tensor; receives the parameter, the state key and the tensor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        part: Callable[[Tensor], Tensor],
        to_whole: Callable[[Tensor, str, Tensor], Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._part, self._to_whole = part, to_whole
        self._given: list[list[Tensor]] = []
        self._parts: dict[Tensor, nn.Parameter] = {}

    def begin(self) -> None:
        """Replace the parameters, gradients and state."""
        for group in self._optimizer.param_groups:
            self._given.append(group["params"])
            group["params"] = [self._part_of(parameter) for parameter in group["params"]]
        for parameter, part in self._parts.items():
            self._move(parameter, part, lambda _, tensor: self._part(tensor))

    def end(self) -> None:
        """Restore the original tensors, with the step's results; no-op if none are replaced."""
        for group, given in zip(self._optimizer.param_groups, self._given, strict=False):
            group["params"] = given
        for parameter, part in self._parts.items():
            target = self._part(parameter.detach())
            if target.data_ptr() != part.data_ptr():
                # Some optimizers assign a new tensor to `parameter.data`.
                target.copy_(part.detach())
            self._move(part, parameter, partial(self._to_whole, parameter))
        self._given, self._parts = [], {}

    def _part_of(self, parameter: Tensor) -> Tensor:
        value = parameter.detach()
        local = self._part(value)
        if local is value:
            return parameter
        part = self._parts[parameter] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            part.grad = self._part(parameter.grad)
        return part

    def _move(self, source: Tensor, target: Tensor, convert: Callable[[str, Tensor], Tensor]) -> None:
        state = self._optimizer.state
        if source in state:
            values = state[target] = state.pop(source)
            for key in values:
                values[key] = apply_to_collection(values[key], Tensor, partial(convert, key))
