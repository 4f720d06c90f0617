"""Copies between DRAM and the memory of a device, each direction on a stream of its own, overlapping with computation.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2.2 (overlap of the tiers' transfers); the notes of torch,
    "CUDA semantics", Use pinned memory buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_largescale.offload.store import Transfer


class Lanes:
    """Copies between DRAM and a device. For the CPU, copies are synchronous.

    Args:
        device: The device.

    Attributes:
        device: The device.
        pinned: Whether memory in DRAM must be pinned for copies to and from the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pinned = device, device.type == "cuda"
        self._to_device: Any = _stream(device) if self.pinned else None
        self._to_host: Any = _stream(device) if self.pinned else None

    def bring(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `sources` to new tensors on the device, in their memory format.

        The current stream waits for the copies; the copies wait for no computation.
        """
        if not self.pinned:
            return {key: source.clone() for key, source in sources.items()}
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._to_device):
            found = {key: source.to(self.device, non_blocking=True) for key, source in sources.items()}
            copied = torch.cuda.current_stream(self.device).record_event()
        current.wait_event(copied)
        for one in found.values():
            one.record_stream(current)
        return found

    def fetch(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Transfer:
        """Begin to copy from the device to DRAM, after the pending work of the current stream.

        Args:
            pairs: Pairs of target, in DRAM, and source, on the device.
        """
        return self._copied(pairs, self._to_host)

    def put(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Transfer:
        """Begin to copy from DRAM to the device, after the pending work of the current stream.

        Do not use the tensors until the transfer has ended.

        Args:
            pairs: Pairs of target, on the device, and source, in DRAM.
        """
        return self._copied(pairs, self._to_device)

    def _copied(self, pairs: Sequence[tuple[Tensor, Tensor]], stream: Any) -> Transfer:
        if not self.pinned:
            for target, source in pairs:
                target.copy_(source)
            return Transfer()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                for one in (target, source):
                    # The tensor may be freed before the copy ends.
                    if one.device.type == "cuda":
                        one.record_stream(stream)
            return Transfer([Copied(stream.record_event())])


class Copied:
    """A request for a copy on a device, whose end a CUDA event marks.

    Args:
        event: The event, recorded on the copy's stream after the copy.
    """

    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        """Return whether the copy has ended."""
        return bool(self._event.query())

    def exception(self) -> None:
        """Wait until the copy has ended."""
        self._event.synchronize()


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
