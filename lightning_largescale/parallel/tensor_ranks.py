"""Differentiable collectives of tensor-parallel ranks on plain local tensors.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (f and g); Korthikanti et al. 2022, "Reducing Activation
    Recomputation in Large Transformer Models", section 4.2.2 (g-bar: gathers whose gradients are reduced, and back).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_largescale import compat
from lightning_largescale.workload.parts import Part, cut, join, share


class MeshRanks:
    """The ranks along one axis of a mesh.

    Args:
        mesh: the mesh, whose process groups run the collectives.
        axis: index of the mesh axis.

    Attributes:
        size: number of ranks along the axis.
        rank: this process's rank along the axis.
    """

    def __init__(self, mesh: DeviceMesh, axis: int = 0) -> None:
        self._group = mesh.get_group(axis)
        self.size, self.rank = mesh.size(axis), mesh.get_local_rank(axis)

    def __deepcopy__(self, memo: Any) -> MeshRanks:
        return self

    def enter(self, tensor: Tensor) -> Tensor:
        """Return `tensor`; backward all-reduces its gradient."""
        return _linear(tensor, lambda given: given.view_as(given), self._reduce_copy)

    def reduce(self, tensor: Tensor) -> Tensor:
        """All-reduce `tensor` in place; backward passes the gradient through."""
        return _linear(tensor, self._sum_in_place, self.enter)

    def gather(self, local: Tensor, part: Part) -> Tensor:
        """All-gather `local`; backward takes this rank's shard of the gradient."""
        return _linear(local, lambda given: self.whole(given, part), lambda gradient: self.own(gradient, part))

    def own(self, whole: Tensor, part: Part) -> Tensor:
        """Return this rank's shard of `whole`, which is equal on all ranks; backward all-gathers the gradient."""
        return _linear(whole, lambda given: self._cut(given, part), lambda gradient: self.gather(gradient, part))

    def gather_entering(self, local: Tensor, part: Part) -> Tensor:
        """All-gather `local`; backward reduce-scatters the gradient."""
        return _linear(
            local, lambda given: self.whole(given, part), lambda gradient: self.reduce_to_part(gradient, part)
        )

    def reduce_to_part(self, tensor: Tensor, part: Part) -> Tensor:
        """Reduce-scatter `tensor`; backward all-gathers the gradient."""
        return _linear(
            tensor, lambda given: self._summed_part(given, part), lambda gradient: self.gather_entering(gradient, part)
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all ranks' `tensor` as a new tensor, without a gradient."""
        summed = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=self._group)
        return summed

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the element-wise maximum of all ranks' `tensor`, without a gradient."""
        largest = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return largest

    def whole(self, local: Tensor, part: Part) -> Tensor:
        """All-gather the full tensor of which `local` is this rank's shard, without a gradient."""
        lengths = [sum(share(piece, rank, self.size)[1] for piece in part.pieces) for rank in range(self.size)]
        longest = max(lengths)
        sent = local.detach()
        if lengths[self.rank] < longest:
            # The all-gather needs equal sizes on all ranks.
            shape = [*local.shape]
            shape[part.dim] = longest - lengths[self.rank]
            sent = torch.cat([sent, sent.new_zeros(shape)], part.dim)
        sent = sent.contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self._group)
        return join([one.narrow(part.dim, 0, length) for one, length in zip(received, lengths, strict=True)], part)

    def check(self, condition: Tensor, message: str) -> None:
        """Raise an IndexError, or trigger a device-side assert on a GPU, unless the one-element `condition` is true."""
        if condition.device.type == "cpu":
            if not condition:
                raise IndexError(message)
        else:
            compat.assert_async(condition, message)

    @contextmanager
    def own_random(self, device: torch.device) -> Iterator[None]:
        """Context with a different random state on each rank; afterwards the state before, equal on all, continues."""
        seed = int(torch.empty((), dtype=torch.int64).random_(2**62))
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def _reduce_copy(self, tensor: Tensor) -> Tensor:
        """Like `reduce`, but out of place, since other code may use `tensor`."""
        return _linear(tensor, self.sum, self.enter)

    def _sum_in_place(self, tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            return self.sum(tensor)
        summed = tensor.detach()
        dist.all_reduce(summed, group=self._group)
        return summed

    def _cut(self, whole: Tensor, part: Part) -> Tensor:
        return cut(whole, part, self.rank, self.size).contiguous()

    def _summed_part(self, tensor: Tensor, part: Part) -> Tensor:
        if any(piece % self.size for piece in part.pieces):
            return cut(self.sum(tensor), part, self.rank, self.size)
        cuts = [cut(tensor.detach(), part, rank, self.size) for rank in range(self.size)]
        sent, received = torch.cat(cuts), torch.empty_like(cuts[0], memory_format=torch.contiguous_format)
        compat.reduce_scatter_tensor(received, sent, self._group)
        return received


_Map = Callable[[Tensor], Tensor]


def _linear(tensor: Tensor, operation: _Map, adjoint: _Map) -> Tensor:
    return _Linear.apply(tensor, operation, adjoint)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """A linear collective operation; its backward is the adjoint operation, which is differentiable itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, operation: _Map, adjoint: _Map) -> Tensor:
        ctx.adjoint = adjoint
        return operation(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(gradient), None, None
