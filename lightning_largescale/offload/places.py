"""The location of the parameters and gradients of a page during an optimizer step.

Source: Ren et al. 2021, "ZeRO-Offload", section 4 (the optimizer's step on the host).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_largescale.dtensors import local_of
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.pages import Page, ParamEntry, ParamSlice
from lightning_largescale.offload.store import Transfer
from lightning_largescale.tiers import aligned


class Places:
    """Parameters and gradients that stay in memory. Subclasses move them along with the state.

    Attributes:
        on_host: Whether parameters on a device are stepped on in DRAM.
    """

    on_host = False

    def bytes_per_element(self, entry: ParamEntry) -> int:
        """Return the bytes that move per element of `entry`, besides its state."""
        return 0

    def moved_bytes(self, page: Page) -> int:
        """Return the bytes that move with `page`, besides its state."""
        return 0

    def keeps(self, entry: ParamEntry) -> bool:
        """Return whether `entry` is stepped on in place."""
        return True

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to read what moves with `page` into `buffer`, starting at byte `at`."""
        return ()

    def write(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to write what moves with `page` and was changed back from `buffer`, laid out as `read` does."""
        return ()

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield views of the elements of each slice of `page` and of their gradient; None if they have no gradient."""
        for span in page.slices:
            gradient = span.entry.parameter.grad
            yield (
                elements(span.entry.local, span),
                None if gradient is None else elements(local_of(gradient), span),
            )


class HostPlaces(Places):
    """Parameters on a device that the CPU steps on in DRAM.

    They and their gradients are copied to DRAM; afterwards the parameters are copied back.

    Args:
        lanes: Copies to and from the device.
        others: The places of parameters that are offloaded already.
    """

    on_host = True

    def __init__(self, lanes: Lanes, others: Places) -> None:
        self._lanes, self._others = lanes, others

    def bytes_per_element(self, entry: ParamEntry) -> int:
        """Return the bytes per element of the parameter and its gradient, if they are copied."""
        return 2 * entry.local.element_size() if self._copies(entry) else self._others.bytes_per_element(entry)

    def moved_bytes(self, page: Page) -> int:
        """Return the bytes of the page's parameters and gradients, if they are copied."""
        if not self._copies(page.slices[0].entry):
            return self._others.moved_bytes(page)
        return sum(2 * _aligned_bytes(span) for span in page.slices)

    def keeps(self, entry: ParamEntry) -> bool:
        """Return False for a parameter that is copied, else what the other places return."""
        return not self._copies(entry) and self._others.keeps(entry)

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to copy parameters and gradients to DRAM."""
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
        """Begin to copy parameters back to the device."""
        if not self._copies(page.slices[0].entry):
            return self._others.write(page, buffer, at)
        here, there = super().values(page, buffer, at), self.values(page, buffer, at)
        return [self._lanes.put([(given, copy) for (given, _), (copy, _) in zip(here, there, strict=True)])]

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield views of the copies in `buffer`."""
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
            # In the memory order of the state, since some kernels traverse the memory of all of these tensors together.
            values, copied = map(span.entry.laid_out, copies) if span.whole else copies
            yield values, None if gradient is None else copied

    def _copies(self, entry: ParamEntry) -> bool:
        """Return whether `entry` is on the device and its state is not."""
        on_device = entry.local.device.type == self._lanes.device.type
        return on_device and bool(entry.spec.dtypes) and self._others.keeps(entry)


def _aligned_bytes(span: ParamSlice) -> int:
    """Return the bytes of the slice's elements, rounded up to the alignment of the next tensor."""
    return aligned((span.stop - span.start) * span.entry.local.element_size())


def elements(tensor: Tensor, span: ParamSlice) -> Tensor:
    """Return the elements in `span` of the local shard of a parameter, or of a tensor of its shape."""
    return tensor if span.whole else tensor.reshape(-1)[span.start : span.stop]
