"""Part: how a tensor is sharded among the ranks of tensor parallelism."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_largescale_part"


@dataclass(frozen=True, slots=True)
class Part:
    """The sharding of which a local tensor is one rank's shard.

    Attributes:
        dim: the sharded dimension.
        pieces: sizes of the sections of that dimension that are each sharded separately, in elements of the unsharded
            tensor: `(size,)`, or three sections for q, k and v side by side. A rank holds its shards of all sections,
            side by side.
        origins: names of the matrices that the sharding comes from; filled only by the search for what can be sharded.
    """

    dim: int
    pieces: tuple[int, ...]
    origins: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Size of the unsharded dimension."""
        return sum(self.pieces)

    def at(self, dim: int) -> Part:
        """Return the same sharding of dimension `dim`."""
        return dataclasses.replace(self, dim=dim)

    def alike(self, other: Part) -> bool:
        """Return whether both shard their dimension alike, whichever dimension that is."""
        return self.pieces == other.pieces

    def joined(self, other: Part) -> Part:
        """Return the same sharding, with the origins of both."""
        return dataclasses.replace(self, origins=self.origins | other.origins)


def part_of(tensor: object) -> Part | None:
    """Return the sharding of `tensor`; None if it is unsharded or not a tensor."""
    return getattr(tensor, _ATTRIBUTE, None)


def as_part(local: Tensor, part: Part) -> Tensor:
    """Mark `local` as a shard of `part`, and return it."""
    setattr(local, _ATTRIBUTE, part)
    return local


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return start and length of one rank's shard of a dimension; of uneven shards the larger are first.

    Args:
        size: The number of elements in the dimension.
        rank: The number of the rank.
        ranks: The number of ranks.

    Source: torch.distributed.tensor.Shard, which shards as `torch.chunk` does.
    """
    chunk = -(-size // ranks)
    start = min(rank * chunk, size)
    return start, min(start + chunk, size) - start


def cut(whole: Tensor, part: Part, rank: int, ranks: int) -> Tensor:
    """Return one rank's shard of a tensor; a view if `part` has one section.

    Args:
        whole: The unsharded tensor.
        part: The sharding.
        rank: The number of the rank.
        ranks: The number of ranks.
    """
    starts = itertools.accumulate(part.pieces[:-1], initial=0)
    shares = [(start, *share(size, rank, ranks)) for start, size in zip(starts, part.pieces, strict=True)]
    stretches = [whole.narrow(part.dim, start + offset, length) for start, offset, length in shares]
    return stretches[0] if len(stretches) == 1 else torch.cat(stretches, part.dim)


def join(parts: list[Tensor], part: Part) -> Tensor:
    """Return the unsharded tensor from `parts`, the shards of all ranks in order."""
    ranks = len(parts)
    by_rank = [
        torch.split(one, [share(size, rank, ranks)[1] for size in part.pieces], part.dim)
        for rank, one in enumerate(parts)
    ]
    return torch.cat([stretches[piece] for piece in range(len(part.pieces)) for stretches in by_rank], part.dim)


def global_shape(local: Tensor) -> torch.Size:
    """Return the unsharded shape of `local`."""
    part = part_of(local)
    if part is None:
        return local.shape
    return torch.Size([part.size if dim == part.dim else size for dim, size in enumerate(local.shape)])
