"""Copies of shards from DRAM to a CUDA device, where FSDP2 gathers them.

With one rank, FSDP2 copies a shard on the computing stream; it also blocks on each copy from memory that is not pinned.
Here the shards of an FSDP group are copied together on a separate stream, so that the copies overlap with the
computation of the preceding groups.

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
    """Copies of shards from DRAM to a CUDA device.

    Args:
        device: The device that gathers the shards.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def copies(self, sources: Iterable[Tensor]) -> Iterator[tuple[Sequence[Tensor], Transfer]]:
        """Context that yields copies of `sources` on the device, and the transfer that ends when `sources` are read.

        The current stream waits for the copies and must be the only one that reads them.

        Args:
            sources: Tensors in pinned DRAM.
        """
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            found = [source.to(self._device, non_blocking=True) for source in sources]
            copied = self._stream.record_event()
        current.wait_event(copied)
        try:
            yield found, Transfer([Copied(copied)])
        finally:
            # Later copies may reuse this memory, so they wait for the current stream.
            self._stream.wait_event(current.record_event())


class ShardsInDram:
    """The shards of a module's blocks in pinned DRAM, copied to the device by `ShardCopies`, until `stop`.

    Args:
        blocks: The blocks that `fully_shard` was applied to.
        copies: Copies to the device.
    """

    def __init__(self, blocks: Iterable[nn.Module], copies: ShardCopies) -> None:
        self._copies = copies
        self._undo = contextlib.ExitStack()
        for module in blocks:
            self._undo.callback(compat.around_gathers(module, bring=self._bring))

    def stop(self) -> None:
        """Let FSDP2 copy the shards again."""
        self._undo.close()

    @contextlib.contextmanager
    def _bring(self, shards: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        with self._copies.copies(shards) as (found, _):
            yield found
