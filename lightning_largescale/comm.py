"""Collectives of all ranks or of a group: the only module that speaks on the default process group.

Each function is a collective of the ranks of `group`, None being all of them; a process without a group is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_largescale.errors import PlanError

_T = TypeVar("_T")
Group: TypeAlias = "dist.ProcessGroup | None"


def is_connected() -> bool:
    """Return whether this process has a default group; no collective."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """Return the number of this rank in `group`; no collective."""
    return dist.get_rank(group) if is_connected() else 0


def world_size(group: Group = None) -> int:
    """Return the number of ranks of `group`; no collective."""
    return dist.get_world_size(group) if is_connected() else 1


def all_gather_object(value: _T, group: Group = None) -> list[_T]:
    """Return every rank's `value`, which can be pickled, in the order of ranks."""
    if world_size(group) == 1:
        return [value]
    values = [value] * world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: _T, source: int = 0, group: Group = None, device: torch.device | None = None) -> _T:
    """Return the `value` of rank `source`, which can be pickled.

    Args:
        value: The value of this rank; only that of `source` counts.
        source: A rank of `group`, by its number among all ranks.
        group: The process group; None is the default group.
        device: The device that its bytes are sent from; None is the current one under NCCL, and the CPU otherwise.
    """
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, source, group, device)
    return box[0]


def barrier(device: torch.device | None = None) -> None:
    """Return when every rank has called this.

    Args:
        device: The device of this rank; without it NCCL picks one, and warns.
    """
    on_device = device is not None and device.type == "cuda" and "nccl" in dist.get_backend()
    dist.barrier(device_ids=[device.index] if device is not None and on_device else None)


def run_on_rank_zero(function: Callable[[], object], what: str) -> None:
    """Call `function` on rank 0, and raise on all ranks if it fails: a collective.

    Args:
        function: The function, which must not call a collective.
        what: Its purpose, for the error: "write the checkpoint".

    Raises:
        PlanError: on the other ranks, if it fails; rank 0 raises the function's own error.
    """
    failure: Exception | None = None
    if rank() == 0:
        try:
            function()
        except Exception as error:
            failure = error
    told = broadcast_object(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if told is not None:
        raise PlanError(f"rank 0 could not {what} ({told}).")


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType | None = None, group: Group = None) -> None:
    """Reduce `tensor` over the ranks, in place.

    Args:
        tensor: The tensor of this rank.
        op: The reduction; None is the sum.
        group: The process group; None is the default group.
    """
    dist.all_reduce(tensor, dist.ReduceOp.SUM if op is None else op, group)


def all_gather(tensors: Sequence[Tensor], tensor: Tensor, group: Group = None) -> None:
    """Gather every rank's `tensor`.

    Args:
        tensors: The tensors that receive the values, in the order of ranks.
        tensor: The tensor of this rank.
        group: The process group; None is the default group.
    """
    dist.all_gather([*tensors], tensor, group)


def broadcast(tensor: Tensor, source: int = 0, group: Group = None) -> None:
    """Overwrite `tensor` with that of rank `source`, in place.

    Args:
        tensor: The tensor of this rank.
        source: A rank of `group`, by its number among all ranks.
        group: The process group; None is the default group.
    """
    dist.broadcast(tensor, source, group)


def send(tensor: Tensor, to: int) -> None:
    """Send `tensor` to rank `to`, by its number among all ranks, which must receive it: no collective."""
    dist.send(tensor, to)


def receive(tensor: Tensor, source: int) -> None:
    """Receive `tensor` from rank `source`, by its number among all ranks, in place: no collective."""
    dist.recv(tensor, source)
