"""Average over all ranks, after backward, of gradients that nothing has reduced during backward."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_largescale import comm, compat
from lightning_largescale.parallel.average import average_in_place
from lightning_largescale.parallel.rows import sparse_rows

# Approximate size of a bucket of gradients, as in DistributedDataParallel.
_BUCKET_BYTES = 25 * 2**20


class Seen(enum.IntFlag):
    """Properties of a parameter after backward."""

    TRAINABLE = enum.auto()
    DENSE = enum.auto()  # has a dense gradient
    SPARSE = enum.auto()  # has a sparse gradient
    REENTERED = enum.auto()  # accumulated several times, or by a backward within the backward

    @property
    def used(self) -> bool:
        """Return whether there is a gradient."""
        return bool(self & (Seen.DENSE | Seen.SPARSE))


def agree(parameters: Sequence[nn.Parameter], reentered: Collection[int], device: torch.device) -> list[Seen]:
    """Return, for each parameter, the properties that it has on any rank; a collective.

    Args:
        parameters: the parameters, of the same module on all ranks.
        reentered: ids of the parameters that are REENTERED on this rank.
        device: this rank's device.
    """
    own = [_seen(parameter, id(parameter) in reentered) for parameter in parameters]
    bits = torch.tensor([[bool(one & bit) for one in own] for bit in Seen], dtype=torch.uint8).to(device)
    comm.all_reduce(bits, dist.ReduceOp.MAX)
    found = [Seen(0)] * len(own)
    for bit, row in zip(Seen, bits.tolist(), strict=True):
        found = [one | bit if there else one for one, there in zip(found, row, strict=True)]
    return found


def _seen(parameter: nn.Parameter, reentered: bool) -> Seen:
    seen = Seen.TRAINABLE if parameter.requires_grad else Seen(0)
    if reentered:
        seen |= Seen.REENTERED
    if parameter.grad is not None:
        seen |= Seen.SPARSE if parameter.grad.is_sparse else Seen.DENSE
    return seen


@torch.no_grad()
def average_gradients(parameters: Iterable[tuple[nn.Parameter, Seen]]) -> None:
    """Average the gradients of `parameters` over all ranks, in place; a collective.

    Gradients that are averaged already do not change. A rank without a gradient contributes zeros and gets the average.

    Args:
        parameters: used parameters, each with its result of `agree`.
    """
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for parameter, seen in parameters:
        if Seen.DENSE not in seen:
            _average_sparse(parameter)
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
        gradient = parameter.grad.detach()
        bucket = waiting.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(one.nbytes for one in bucket) >= _BUCKET_BYTES:
            _average_together(waiting.pop(gradient.dtype))
    for bucket in waiting.values():
        _average_together(bucket)


def _average_together(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        average_in_place(bucket[0])
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    average_in_place(flat)
    for gradient, averaged in zip(bucket, torch.split(flat, [one.numel() for one in bucket]), strict=True):
        gradient.copy_(averaged.view(gradient.shape))


def _average_sparse(parameter: nn.Parameter) -> None:
    gradient = parameter.grad
    if gradient is None:
        none = torch.empty(0, dtype=torch.int64, device=parameter.device)
        gradient = sparse_rows(none, parameter.new_empty((0, *parameter.shape[1:])), parameter.shape)
    gradient = gradient.detach().coalesce()
    average_in_place(gradient)
    parameter.grad = gradient


class Accumulations:
    """Records how gradients are accumulated in backward.

    Args:
        parameters: the parameters to watch, frozen ones included.

    Attributes:
        reentered: ids of parameters whose gradient a backward has accumulated several times, or in a backward within
            it, as reentrant activation checkpointing does.
        outside: whether a backward without `start` has accumulated gradients since this was set to False.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.reentered: set[int] = set()
        self.outside = False
        self._told = False
        self._task: int | None = None
        self._accumulated: set[int] = set()
        self._handles = [_hooked(parameter, self._accumulate) for parameter in parameters]

    def start(self, loss: Tensor) -> None:
        """Begin a backward from `loss`."""
        self._told, self._task = True, None
        self._accumulated.clear()
        if self._handles and loss.requires_grad:
            loss.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """End the backward."""
        self._told = False

    @property
    def has_any(self) -> bool:
        """Return whether the backward has accumulated gradients of watched parameters."""
        return bool(self._accumulated)

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, _: Tensor) -> None:
        self._task = compat.current_backward()

    def _accumulate(self, parameter: Tensor) -> None:
        if not self._told:
            self.outside = True
            return
        if id(parameter) in self._accumulated or compat.current_backward() != self._task:
            self.reentered.add(id(parameter))
        self._accumulated.add(id(parameter))


def _hooked(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    trainable = parameter.requires_grad
    # torch accepts hooks on trainable tensors only, and keeps them when the tensor is frozen.
    parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return handle
    finally:
        parameter.requires_grad_(trainable)
