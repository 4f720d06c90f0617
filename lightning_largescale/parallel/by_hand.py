"""Gradients that user code computes and assigns itself: `torch.autograd.grad`, and assignments to `.grad`.

A derivative with respect to a parameter is taken with respect to its leaf, unsharded or not, and averaged over the
ranks, as a single process would compute it from all their samples. Assigned gradients are averaged likewise. In a step
they stay full tensors until the optimizer steps, or until the next backward of their group reduces them; outside of
steps they are sharded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.order import divided, full, order_of
from lightning_largescale.parallel.parameter_access import GRADIENT, TRACED, watched
from lightning_largescale.parallel.watched import Watched

# Attribute in which a parameter keeps its `Average`.
_AVERAGE = "_largescale_average"


class AveragedParameter(nn.Parameter):
    """A replicated parameter whose assigned gradients are averaged over the ranks."""

    @property
    def grad(self) -> Tensor | None:
        """The parameter's gradient."""
        return GRADIENT.__get__(self)  # type: ignore[no-any-return]

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        average = vars(self).get(_AVERAGE)
        value = value if value is None or average is None else average(value)
        GRADIENT.__set__(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = nn.Parameter(self.detach(), requires_grad=self.requires_grad)
        return plain.__reduce_ex__(protocol)


def average_assigned(parameter: nn.Parameter, average: Average | None) -> None:
    """Average gradients that are assigned to the replicated `parameter`; stop doing so if `average` is None."""
    if average is None:
        vars(parameter).pop(_AVERAGE, None)
        parameter.__class__ = nn.Parameter
    elif type(parameter) is nn.Parameter:
        parameter.__class__ = AveragedParameter
        vars(parameter)[_AVERAGE] = average


def set_gradient(in_step: Callable[[], bool], found: Watched, value: Tensor) -> None:
    """Assign `value`, which is not a shard, to the gradient of a sharded parameter; a collective.

    Args:
        in_step: returns whether a step runs.
        found: the parameter.
        value: the gradient.

    Raises:
        PlanError: `value` does not have the parameter's shape.
    """
    one = found.one
    leaf, shard = one.leaf, one.shard
    if value.shape != shard.shape:
        raise PlanError(
            f"the gradient of {one.name!r} is assigned a tensor of shape {tuple(value.shape)}, and its own is"
            f" {tuple(shard.shape)}; assign one of that."
        )
    if isinstance(value, DTensor):
        if value.device_mesh == shard.device_mesh:
            found.set_gradient(value.redistribute(shard.device_mesh, shard.placements))
            return
        value = full(value, order_of(shard))
    value = found.average(value)
    if in_step() and leaf is not None and not isinstance(leaf, DTensor) and leaf.dtype == value.dtype:
        found.hold_gradient(value)
    else:
        found.set_gradient(divided(value.to(shard.dtype), shard, order_of(shard)))


def reduce_assigned(groups: Iterable[tuple[nn.Module, Sequence[Watched]]]) -> None:
    """Reduce gradients that were assigned and not reduced since; a collective."""
    for group, parameters in groups:
        if any(one.one.has_unreduced_gradient for one in parameters):
            compat.reduce_gradients(group)


def differentiate_leaves() -> Callable[[], None]:
    """Make autograd differentiate with respect to leaves in place of shards; return a function that undoes it."""
    undo: Callable[[], None] = compat.around_engine(_differentiate)
    return undo


def _differentiate(
    engine: Callable[..., Any], inputs: Sequence[Tensor], *, create_graph: bool, accumulate: bool
) -> Any:
    if not (accumulate or create_graph) and any(getattr(one, TRACED, False) for one in inputs):
        raise PlanError(
            "torch.autograd.grad is taken of a sharded parameter of a module that torch.compile was called on, which"
            " averages no gradients; leave torch.compile out and give the strategy compile=True, or call"
            " `manual_backward(loss)`."
        )
    known = [watched(one) for one in inputs]
    leaves = [
        one if found is None or found.one.leaf is None else found.one.leaf
        for one, found in zip(inputs, known, strict=True)
    ]
    results = engine(tuple(leaves))
    averages = [_average_of(one, found) for one, found in zip(inputs, known, strict=True)]
    places = [place for place, average in enumerate(averages) if average is not None]
    if accumulate or create_graph or not places:
        return results
    gradients = list(results)
    local = [None if results[place] is None else _local(results[place], leaves[place]) for place in places]
    like = [_like(inputs[place], known[place]) for place in places]
    average = averages[places[0]]
    assert average is not None
    for place, gradient in zip(places, average.each(local, like), strict=True):
        gradients[place] = None if gradient is None else _whole(gradient, leaves[place], inputs[place])
    return tuple(gradients)


def _average_of(given: Tensor, found: Watched | None) -> Average | None:
    if found is not None:
        return found.average
    return vars(given).get(_AVERAGE) if isinstance(given, AveragedParameter) else None


def _local(gradient: Tensor, leaf: Tensor) -> Tensor:
    if not isinstance(leaf, DTensor):
        return gradient
    assert isinstance(gradient, DTensor)
    if gradient.placements != leaf.placements:
        gradient = gradient.redistribute(leaf.device_mesh, leaf.placements)
    local: Tensor = compat.local_tensor(gradient)
    return local


def _like(given: Tensor, found: Watched | None) -> Tensor:
    """Return a tensor of the shape of the result of `_local`, in the parameter's dtype."""
    if found is None:
        return given.detach()
    leaf = found.one.leaf
    if leaf is None:
        return torch.empty(found.one.shard.shape, dtype=given.dtype, device=given.device)
    shape = compat.local_tensor(leaf).shape if isinstance(leaf, DTensor) else leaf.shape
    return torch.empty(shape, dtype=found.one.shard.dtype, device=leaf.device)


def _whole(gradient: Tensor, leaf: Tensor, given: Tensor) -> Tensor:
    if not isinstance(leaf, DTensor) or isinstance(gradient, DTensor):
        return gradient
    found = watched(given)
    assert found is not None
    placed = DTensor.from_local(
        gradient, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )
    return full(placed, order_of(found.one.shard))
