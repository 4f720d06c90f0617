"""Copies between DRAM and the memory of a device, each direction on a stream of its own, beside what computes.

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
    """The way between DRAM and a device; on the CPU, whose memory DRAM is, copies are done at once.

    Args:
        device: at the other end.

    Attributes:
        device: as given.
        pinned: whether memory in DRAM is to be pinned for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pinned = device, device.type == "cuda"
        self._to_device: Any = _stream(device) if self.pinned else None
        self._to_host: Any = _stream(device) if self.pinned else None

    def bring(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New tensors on the device with the values of `sources`, in their memory format: what computes next on the
        current stream waits for them, and they wait for nothing that computes.
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
        """Begin to copy, into the first of each pair, in DRAM, the second, on the device, as what computes on the
        current stream leaves it.
        """
        return self._copied(pairs, self._to_host)

    def put(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Transfer:
        """Begin to copy, into the first of each pair, on the device, the second, in DRAM, once what computes on the
        current stream is done; until the transfer is over nothing may compute with them.
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
                    # It may be let go before the copy is over.
                    if one.device.type == "cuda":
                        one.record_stream(stream)
            return Transfer([Copied(stream.record_event())])


class Copied:
    """A request whose end is an event of the device.

    Args:
        event: of a copy's stream, after it.
    """

    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        """Whether it has come."""
        return bool(self._event.query())

    def exception(self) -> None:
        """Until it has come."""
        self._event.synchronize()


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
