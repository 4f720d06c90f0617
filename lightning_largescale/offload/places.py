"""Where an optimizer finds the parameters and gradients of a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_largescale.offload.memory import Memory
from lightning_largescale.offload.pages import Member, Page, Piece, local_of
from lightning_largescale.offload.store import Transfer


class Places:
    """Parameters and gradients that are in memory, where they stay; one of another kind moves them as well."""

    def bytes_per_element(self, member: Member) -> int:
        """What moves with an element of `member`, beside its state."""
        return 0

    def moved_bytes(self, page: Page) -> int:
        """What moves with `page`, beside its state."""
        return 0

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to bring what moves with `page` into `buffer`, from its byte `at` on."""
        return ()

    def write(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to take what moves with `page`, and was changed, from where `read` brought it."""
        return ()

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The elements of each piece of `page`, and their gradient, if they have one; views of where they are."""
        for piece in page.pieces:
            gradient = piece.member.parameter.grad
            yield elements(piece.member.local, piece), None if gradient is None else elements(local_of(gradient), piece)


def elements(tensor: Tensor, piece: Piece) -> Tensor:
    """Of this rank's part of a parameter, or of what has its shape, those in `piece`."""
    return tensor if piece.whole else tensor.reshape(-1)[piece.start : piece.stop]
