"""Part: what of a tensor one rank of tensor parallelism holds."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_largescale_part"


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a tensor a local tensor is.

    Attributes:
        dim: the dimension that is divided.
        pieces: sizes of the stretches of that dimension which are divided each by itself, in elements of the whole
            tensor: `(size,)`, or three of q, k and v side by side. A rank holds its share of each, side by side.
        origins: names of the matrices that the division comes from, where they are looked for.
    """

    dim: int
    pieces: tuple[int, ...]
    origins: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Of the whole dimension."""
        return sum(self.pieces)

    def at(self, dim: int) -> Part:
        """The same division, of another dimension."""
        return dataclasses.replace(self, dim=dim)

    def alike(self, other: Part) -> bool:
        """Whether the dimensions are divided alike, whichever they are."""
        return self.pieces == other.pieces

    def joined(self, other: Part) -> Part:
        """The same division, coming from both."""
        return dataclasses.replace(self, origins=self.origins | other.origins)


def part_of(tensor: object) -> Part | None:
    """What `tensor` is a part of; None where it is whole, or no tensor."""
    return getattr(tensor, _ATTRIBUTE, None)


def as_part(local: Tensor, part: Part) -> Tensor:
    """`local`, marked as the part that it is."""
    setattr(local, _ATTRIBUTE, part)
    return local


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and length of what `rank` of `ranks` has of `size` elements: the first ranks have more where it is uneven.

    Source: torch.distributed.tensor.Shard, which divides as `torch.chunk` does.
    """
    chunk = -(-size // ranks)
    start = min(rank * chunk, size)
    return start, min(start + chunk, size) - start


def cut(whole: Tensor, part: Part, rank: int, ranks: int) -> Tensor:
    """What `rank` of `ranks` has of `whole`; a view of it where `part` is of one piece."""
    starts = itertools.accumulate(part.pieces[:-1], initial=0)
    shares = [(start, *share(size, rank, ranks)) for start, size in zip(starts, part.pieces, strict=True)]
    stretches = [whole.narrow(part.dim, start + offset, length) for start, offset, length in shares]
    return stretches[0] if len(stretches) == 1 else torch.cat(stretches, part.dim)


def join(parts: list[Tensor], part: Part) -> Tensor:
    """The whole tensor whose parts, those of all ranks in their order, are `parts`."""
    ranks = len(parts)
    by_rank = [
        torch.split(one, [share(size, rank, ranks)[1] for size in part.pieces], part.dim)
        for rank, one in enumerate(parts)
    ]
    return torch.cat([stretches[piece] for piece in range(len(part.pieces)) for stretches in by_rank], part.dim)


def global_shape(local: Tensor) -> torch.Size:
    """The shape of the whole tensor that `local` is, or is a part of."""
    part = part_of(local)
    if part is None:
        return local.shape
    return torch.Size([part.size if dim == part.dim else size for dim, size in enumerate(local.shape)])
