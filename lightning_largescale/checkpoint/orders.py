"""Restoring the element order of tensors computed from parameters that are sharded in several pieces.

Such a tensor has the order of its parameter, but torch returns a new tensor from each operation, without the mark.
Hooks that cast weights, or average them, put such tensors into checkpoints under the names of their parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.order import as_ordered, order_of
from lightning_largescale.workload.parts import Part


def tell_orders(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Mark sharded tensors in `checkpoint` with the element order of the parameter whose name they have.

    Raises:
        PlanError: a tensor is sharded as a parameter with an order of its own is, but has no parameter's name; or it
            may be of several parameters with different orders.
    """
    parameters = {name: one for name, one in module.named_parameters() if isinstance(one, DTensor)}
    ordered = {name: part for name, one in parameters.items() if (part := order_of(one)) is not None}
    if not ordered:
        return
    own = {one.to_local().data_ptr() for one in parameters.values()}
    for path, tensor in _divided(checkpoint, ()):
        if order_of(tensor) is not None or tensor.to_local().data_ptr() in own:
            continue
        alike = [name for name in ordered if _alike(parameters[name], tensor)]
        named = [name for name in parameters if any(_same(name, key) for key in path)]
        if any(name in ordered for name in named):
            as_ordered(tensor, _one([ordered.get(name) for name in named], path))
        elif alike and not named:
            raise PlanError(
                f"{'.'.join(path)!r} in the checkpoint is divided as {alike[0]!r} is, whose elements stand in another"
                " order on the ranks; keep it under that parameter's name, or compute it in"
                " `with trainer.strategy.full_parameters():`."
            )


def _divided(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], DTensor]]:
    if isinstance(value, DTensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _divided(one, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _divided(one, (*path, str(index)))


def _same(name: str, key: str) -> bool:
    """Return whether `key` denotes the parameter `name`: equal, or a key with a dot if one is a suffix of the other."""
    return name == key or ("." in key and (name.endswith(f".{key}") or key.endswith(f".{name}")))


def _alike(parameter: DTensor, tensor: DTensor) -> bool:
    return (parameter.shape, parameter.placements) == (tensor.shape, tensor.placements)


def _one(parts: list[Part | None], path: tuple[str, ...]) -> Part | None:
    if any(part != parts[0] for part in parts):
        raise PlanError(
            f"{'.'.join(path)!r} in the checkpoint may be of parameters of different orders; keep it under the whole"
            " name of its parameter."
        )
    return parts[0]
