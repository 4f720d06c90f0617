"""Averages over the data-parallel ranks, of tensors that neither FSDP2 nor DistributedDataParallel reduces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_largescale import comm
from lightning_largescale.parallel.mesh import data_group


@torch.no_grad()
def average_in_place(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Average `tensor` over the ranks of `group`; a collective.

    Args:
        tensor: a contiguous tensor, or a sparse and coalesced one.
        group: the process group; None for all ranks.
    """
    # Divided before the sum, as in DistributedDataParallel: the sum may be too large for half precision.
    tensor.div_(comm.world_size(group))
    comm.all_reduce(tensor, group=group)


class Average:
    """Averages over the data-parallel ranks.

    Args:
        mesh: the mesh that parameters are sharded over.
        meet: called before an average, with its number of elements; waits for ranks that are about to unshard
            parameters in the same process group.

    Attributes:
        group: the process group of the data-parallel ranks.
    """

    def __init__(self, mesh: DeviceMesh, meet: Callable[[int], None] = lambda elements: None) -> None:
        self.group, self._meet = data_group(mesh), meet

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the average of all ranks' `tensor`; a collective."""
        if self.group.size() == 1:
            return tensor
        self._meet(tensor.numel())
        average = tensor.detach().clone(memory_format=torch.contiguous_format)
        average_in_place(average, self.group)
        return average

    def each(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the average of each tensor; a collective per dtype.

        A tensor that is None on some ranks counts as zeros there; the average of one that is None on all ranks is None.

        Args:
            tensors: this rank's tensors.
            like: tensors of the shape and dtype of each result.
        """
        if self.group.size() == 1:
            return [None if one is None else one.to(as_.dtype) for one, as_ in zip(tensors, like, strict=True)]
        found: list[Tensor | None] = [None] * len(tensors)
        for dtype in dict.fromkeys(one.dtype for one in like):
            places = [place for place, one in enumerate(like) if one.dtype == dtype]
            given = [tensors[place] for place in places]
            there = torch.tensor([one is not None for one in given], dtype=dtype, device=like[places[0]].device)
            zeros = [torch.zeros_like(like[place]) if tensors[place] is None else tensors[place] for place in places]
            flat = [there, *(one.detach().reshape(-1).to(dtype) for one in zeros if one is not None)]
            average = torch.split(self(torch.cat(flat)), [one.numel() for one in flat])
            for place, share, one in zip(places, average[0].tolist(), average[1:], strict=True):
                found[place] = one.view(like[place].shape) if share else None
        return found
