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
    """The number of this rank in `group`; no collective."""
    return dist.get_rank(group) if is_connected() else 0


def world_size(group: Group = None) -> int:
    """How many ranks `group` has; no collective."""
    return dist.get_world_size(group) if is_connected() else 1


def all_gather_object(value: _T, group: Group = None) -> list[_T]:
    """Every rank's `value`, which can be pickled, in the order of ranks."""
    if world_size(group) == 1:
        return [value]
    values = [value] * world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: _T, source: int = 0, group: Group = None, device: torch.device | None = None) -> _T:
    """The `value` of rank `source` of all ranks, which can be pickled.

    Args:
        value: of this rank.
        source: a rank of `group`, by its number among all.
        group: of the ranks.
        device: that its bytes travel by; None takes the current one under NCCL, and the CPU otherwise.
    """
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, source, group, device)
    return box[0]


def barrier(device: torch.device | None = None) -> None:
    """Return when every rank has come here.

    Args:
        device: of this rank; without it NCCL picks one, and warns.
    """
    on_device = device is not None and device.type == "cuda" and "nccl" in dist.get_backend()
    dist.barrier(device_ids=[device.index] if device is not None and on_device else None)


def run_on_rank_zero(function: Callable[[], object], what: str) -> None:
    """Have rank 0 of all ranks call `function`, and no rank go on where it fails.

    Args:
        function: called on rank 0 alone, in which it takes part in no collective.
        what: it does, for a message: "write the checkpoint".

    Raises:
        PlanError: on the others, when it fails; on rank 0 its own error is raised.
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
    """Reduce `tensor` in place; without `op` to the sum."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM if op is None else op, group)


def all_gather(tensors: Sequence[Tensor], tensor: Tensor, group: Group = None) -> None:
    """Put every rank's `tensor` into `tensors`, in the order of ranks."""
    dist.all_gather([*tensors], tensor, group)


def broadcast(tensor: Tensor, source: int = 0, group: Group = None) -> None:
    """Put what rank `source` of all ranks has in `tensor` into it, in place."""
    dist.broadcast(tensor, source, group)


def send(tensor: Tensor, to: int) -> None:
    """Send `tensor` to rank `to` of all ranks, which receives it: no collective."""
    dist.send(tensor, to)


def receive(tensor: Tensor, source: int) -> None:
    """Receive from rank `source` of all ranks into `tensor`: no collective."""
    dist.recv(tensor, source)
