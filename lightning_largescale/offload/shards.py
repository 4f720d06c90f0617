"""Shards on their way from DRAM to a CUDA device, where FSDP2 gathers them.

FSDP2 copies a shard on the stream that computes where there is one rank, and waits for each copy of memory that is not
pinned. Here the shards of a group are copied together, on a stream of their own, so that a copy runs beside what is
still to be computed of the groups before.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2.2 (overlap of the tiers' transfers).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_largescale import compat
from lightning_largescale.offload.lanes import Copied
from lightning_largescale.offload.store import Transfer


class ShardCopies:
    """The way of shards from DRAM to a CUDA device.

    Args:
        device: that gathers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def copies(self, sources: Iterable[Tensor]) -> Iterator[tuple[Sequence[Tensor], Transfer]]:
        """Within, tensors on the device with the values of `sources`, in pinned DRAM, for which the current stream
        waits, and which it alone reads; and what tells when `sources` have been read.
        """
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            found = [source.to(self._device, non_blocking=True) for source in sources]
            copied = self._stream.record_event()
        current.wait_event(copied)
        try:
            yield found, Transfer([Copied(copied)])
        finally:
            # Before others are made in their memory.
            self._stream.wait_event(current.record_event())


class ShardsInDram:
    """The shards of a module's blocks in pinned DRAM, copied as `ShardCopies` does, until `stop`.

    Args:
        blocks: that `fully_shard` was applied to.
        copies: to the device.
    """

    def __init__(self, blocks: Iterable[nn.Module], copies: ShardCopies) -> None:
        self._copies = copies
        self._undo = contextlib.ExitStack()
        for module in blocks:
            self._undo.callback(compat.around_gathers(module, bring=self._bring))

    def stop(self) -> None:
        """Leave it to FSDP2."""
        self._undo.close()

    @contextlib.contextmanager
    def _bring(self, shards: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        with self._copies.copies(shards) as (found, _):
            yield found
