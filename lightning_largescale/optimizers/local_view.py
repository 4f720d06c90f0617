"""Tensors that an optimizer holds for a step in place of its parameters, such as local shards or pages of them.

The user's optimizer and its groups, which schedulers refer to, stay the same objects: only their tensors are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer


class LocalView:
    """Tensors in the groups of an optimizer in place of its parameters, until `close`.

    In between it may step, without evaluating the loss.

    Args:
        optimizer: The optimizer, whose groups are emptied.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._given = [(group, group["params"]) for group in optimizer.param_groups]
        self._held: list[tuple[Tensor, nn.Parameter, Tensor]] = []
        for group, _ in self._given:
            group["params"] = []

    def hold(
        self, number: int, parameter: Tensor, values: Tensor, gradient: Tensor | None, state: dict[str, Any] | None
    ) -> None:
        """Add `values` to the group `number` in place of `parameter`, or of a part of it, with gradient and state."""
        part = nn.Parameter(values, requires_grad=parameter.requires_grad)
        part.grad = gradient
        if state is not None:
            self._optimizer.state[part] = state
        self._given[number][0]["params"].append(part)
        self._held.append((parameter, part, values))

    def hold_as(self, number: int, parameter: Tensor, convert: Callable[[Tensor], Tensor]) -> None:
        """Add `convert` of a parameter, of its gradient and of its state to the group `number`.

        Args:
            number: The group's number.
            parameter: A parameter of the group.
            convert: Function of a tensor that returns one that shares its storage, or the tensor itself.
        """
        given = parameter.detach()
        values = convert(given)
        if values is given:
            self._given[number][0]["params"].append(parameter)
            return
        gradient, state = parameter.grad, self._optimizer.state.pop(parameter, None)
        if state is not None:
            _convert(state, lambda _, tensor: convert(tensor))
        self.hold(number, parameter, values, None if gradient is None else convert(gradient), state)

    def hold_all(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Add all parameters of the optimizer by `hold_as`."""
        for number, (_, parameters) in enumerate(self._given):
            for parameter in parameters:
                self.hold_as(number, parameter, convert)

    def results(self) -> Iterator[dict[str, Any] | None]:
        """Write the new values into the tensors that were held, and yield the state of each, taken off the optimizer.

        Yields:
            For each tensor, in the order in which they were added, its state; None if the optimizer has none of it.
        """
        for _, part, values in self._held:
            if values.data_ptr() != part.data_ptr():
                # Some optimizers assign a new tensor to `parameter.data`.
                values.copy_(part.detach())
            yield self._optimizer.state.pop(part, None)

    def end(self, restore: Callable[[Tensor, str, Tensor], Tensor] = lambda *found: found[-1]) -> None:
        """Give the parameters their state back, with the step's results, and `close`.

        Args:
            restore: The reverse of the `convert` of `hold_as` for a state tensor; receives the parameter, the state
                key and the tensor.
        """
        for (parameter, *_), state in zip(self._held, self.results(), strict=True):
            if state is not None:
                _convert(state, partial(restore, parameter))
                self._optimizer.state[parameter] = state
        self.close()

    def close(self) -> None:
        """Put the parameters back into their groups, and drop state that was not taken off, as after a failed step."""
        for _, part, _ in self._held:
            self._optimizer.state.pop(part, None)
        for group, parameters in self._given:
            group["params"] = parameters


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group: all but its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def set_options(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Give a group these options and no others; it keeps its parameters, and stays the same dict.

    A step on all parameters finds the group as it was before; so must a step on some of them after one on others.
    """
    parameters = group["params"]
    group.clear()
    group.update({"params": parameters, **options})


def bare_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Return `optimizer.step` without the hooks around it and without the wrapper of schedulers that counts calls."""
    step = type(optimizer).step
    # The wrapper that torch adds calls the hooks.
    inner = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    return inner.__get__(optimizer)  # type: ignore[no-any-return]


def _convert(state: dict[str, Any], convert: Callable[[str, Tensor], Tensor]) -> None:
    # The dict object stays, since other code may hold a reference to it.
    for key in state:
        state[key] = apply_to_collection(state[key], Tensor, partial(convert, key))
