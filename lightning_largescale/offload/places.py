"""Where an optimizer finds the parameters and gradients of a page.

Source: Ren et al. 2021, "ZeRO-Offload", section 4 (the optimizer's step on the host).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.pages import Page, ParamEntry, ParamSlice, local_of
from lightning_largescale.offload.store import Transfer
from lightning_largescale.tiers import aligned


class Places:
    """Parameters and gradients that are in memory, where they stay; one of another kind moves them as well.

    Attributes:
        on_host: whether parameters on a device are stepped on in DRAM.
    """

    on_host = False

    def bytes_per_element(self, entry: ParamEntry) -> int:
        """What moves with an element of `entry`, beside its state."""
        return 0

    def moved_bytes(self, page: Page) -> int:
        """What moves with `page`, beside its state."""
        return 0

    def keeps(self, entry: ParamEntry) -> bool:
        """Whether `entry` is stepped on where it is."""
        return True

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to bring what moves with `page` into `buffer`, from its byte `at` on."""
        return ()

    def write(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to take what moves with `page`, and was changed, from where `read` brought it."""
        return ()

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The elements of each slice of `page`, and their gradient, if they have one; views of where they are."""
        for span in page.slices:
            gradient = span.entry.parameter.grad
            yield (
                elements(span.entry.local, span),
                None if gradient is None else elements(local_of(gradient), span),
            )


class HostPlaces(Places):
    """Parameters on a device that are stepped on in DRAM by the host's cores: they and their gradients are copied
    there, and they back.

    Args:
        lanes: to the device.
        others: where those are that are elsewhere already.
    """

    on_host = True

    def __init__(self, lanes: Lanes, others: Places) -> None:
        self._lanes, self._others = lanes, others

    def bytes_per_element(self, entry: ParamEntry) -> int:
        """Of the parameter and of its gradient."""
        return 2 * entry.local.element_size() if self._copies(entry) else self._others.bytes_per_element(entry)

    def moved_bytes(self, page: Page) -> int:
        """Of the parameters and of their gradients."""
        if not self._copies(page.slices[0].entry):
            return self._others.moved_bytes(page)
        return sum(2 * _aligned_bytes(span) for span in page.slices)

    def keeps(self, entry: ParamEntry) -> bool:
        """Not, where it is copied."""
        return not self._copies(entry) and self._others.keeps(entry)

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to copy parameters and gradients."""
        if not self._copies(page.slices[0].entry):
            return self._others.read(page, buffer, at)
        here, there = super().values(page, buffer, at), self.values(page, buffer, at)
        pairs = [
            (copy, source)
            for given, copies in zip(here, there, strict=True)
            for source, copy in zip(given, copies, strict=True)
            if source is not None and copy is not None
        ]
        return [self._lanes.fetch(pairs)]

    def write(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to copy parameters back."""
        if not self._copies(page.slices[0].entry):
            return self._others.write(page, buffer, at)
        here, there = super().values(page, buffer, at), self.values(page, buffer, at)
        return [self._lanes.put([(given, copy) for (given, _), (copy, _) in zip(here, there, strict=True)])]

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The copies."""
        if not self._copies(page.slices[0].entry):
            yield from self._others.values(page, buffer, at)
            return
        assert buffer is not None
        for span in page.slices:
            local, gradient = span.entry.local, span.entry.parameter.grad
            shape = local.shape if span.whole else (span.stop - span.start,)
            length = _aligned_bytes(span)
            copies = [buffer.tensor(local.dtype, shape, at + place) for place in (0, length)]
            at += 2 * length
            # As the state is: some kernels walk through the memory of all of them at once.
            values, copied = map(span.entry.laid_out, copies) if span.whole else copies
            yield values, None if gradient is None else copied

    def _copies(self, entry: ParamEntry) -> bool:
        """Whether it is on the device, and its state is not."""
        on_device = entry.local.device.type == self._lanes.device.type
        return on_device and bool(entry.kind.dtypes) and self._others.keeps(entry)


def _aligned_bytes(span: ParamSlice) -> int:
    """Of its elements, up to where others may begin."""
    return aligned((span.stop - span.start) * span.entry.local.element_size())


def elements(tensor: Tensor, span: ParamSlice) -> Tensor:
    """Of this rank's part of a parameter, or of what has its shape, those in `span`."""
    return tensor if span.whole else tensor.reshape(-1)[span.start : span.stop]
