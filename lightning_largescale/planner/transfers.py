"""Seconds that bytes take between tiers in one optimizer step, and how much of them runs under compute.

A pass fetches the blocks it needs ahead and sends away what is no longer needed while others compute, so it lasts as
long as the slowest of what is busy: its compute, the disk, or one direction of the link between host and device.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 4 (bandwidth that is needed) and 5.2 (overlap).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_largescale.hardware import Link, Rates
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.tiers import PAGE_BYTES

# What carries bytes between tiers, as the terms of a step name it.
CHANNELS = ("nvme read", "nvme write", "host to device", "device to host", "host copies")
Bytes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Away:
    """What one rank keeps in other tiers, bytes by tier.

    Attributes:
        parameters: shards of the groups that leave.
        trained: of these, those that are stepped on; their gradients have as many bytes.
        state: of optimizers.
        activations: saved by one micro-batch.
    """

    parameters: Bytes = field(default_factory=dict)
    trained: Bytes = field(default_factory=dict)
    state: Bytes = field(default_factory=dict)
    activations: Bytes = field(default_factory=dict)

    @classmethod
    def of(cls, sizes: Sizes) -> Away:
        """What the plan of `sizes` keeps in other tiers."""
        place = sizes.placement
        parameters, trained = Counter[str](), Counter[str]()
        for name, tier in place.groups.items():
            parameters[tier] += sizes.shard(name)
            trained[tier] += sizes.gradient(name, whole=False) if sizes.workload.stage == "fit" else 0
        saved = sum(map(sizes.leaving_of, sizes.step.segments))
        activations = {} if place.activations is None else {place.activations: saved}
        return cls(parameters=parameters, trained=trained, state=place.state, activations=activations)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """What the transfers of a step run beside.

    Attributes:
        forward_seconds: of compute in the forward of all micro-batches.
        backward_seconds: likewise, recomputation included.
        optimizer_seconds: of the arithmetic of the optimizer's step.
        root_share: of the trained parameters, those of the root group, which are never released.
        micro_batches: of one optimizer step.
        trains: False where there is a forward only.
        fetches_again: parameters are fetched in backward once more.
        releases: parameters are stepped on in backward.
    """

    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    root_share: float
    micro_batches: int
    trains: bool
    fetches_again: bool
    releases: bool

    @classmethod
    def of(cls, sizes: Sizes, terms: Mapping[str, float]) -> Passes:
        """Those of the plan of `sizes`, whose step has these `terms` of compute."""
        trained = sum(total for _, total in sizes.stepped.values())
        fit = sizes.workload.stage == "fit"
        return cls(
            forward_seconds=terms["forward"],
            backward_seconds=terms["backward"] + terms["recomputation"] if fit else 0.0,
            optimizer_seconds=terms["optimizer step"],
            root_share=sizes.stepped.get(None, (0, 0))[1] / trained if trained else 1.0,
            micro_batches=sizes.accumulate,
            trains=fit,
            fetches_again=fit and sizes.plan.reshard_after_forward,
            releases=sizes.plan.release_gradients,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfers:
    """Seconds between tiers in one optimizer step.

    Attributes:
        terms: by channel: "nvme read", "nvme write"; on CUDA "host to device" and "device to host"; on CPU "host
            copies".
        hidden_seconds: of their sum, what runs under compute and under each other.
    """

    terms: Mapping[str, float]
    hidden_seconds: float

    @property
    def step_seconds(self) -> float:
        """What they add to a step, seconds."""
        return sum(self.terms.values()) - self.hidden_seconds


def transfers(away: Away, passes: Passes, rates: Rates, kind: str) -> Transfers:
    """What keeping `away` elsewhere costs a step.

    Raises:
        ValueError: `rates` lacks that of a tier that is used.

    Source: the module's docstring.
    """
    released = 1 - passes.root_share if passes.releases else 0.0
    stepped = passes.optimizer_seconds
    busy = (passes.forward_seconds, passes.backward_seconds + released * stepped, (1 - released) * stepped)
    terms: dict[str, float] = defaultdict(float)
    hidden = 0.0
    for compute, (read, written) in zip(busy, _traffic(away, passes, released), strict=True):
        channels = _channel_seconds(read, written, rates, kind)
        disk = channels["nvme read"] + channels["nvme write"]
        slowest = max(disk, *(seconds for name, seconds in channels.items() if not name.startswith("nvme")))
        hidden += sum(channels.values()) - max(0.0, slowest - compute)
        for name, seconds in channels.items():
            terms[name] += seconds
    return Transfers(terms=dict(terms), hidden_seconds=hidden)


_Traffic = tuple[Bytes, Bytes]


def _traffic(away: Away, passes: Passes, released: float) -> tuple[_Traffic, _Traffic, _Traffic]:
    """Bytes read from each tier, and written to it, in forward, in backward, and in the optimizer's step."""
    forward, backward, step = ((Counter[str](), Counter[str]()) for _ in range(3))
    micro = passes.micro_batches
    for tier in {*away.parameters, *away.state, *away.activations}:
        parameters, trained, state = (found.get(tier, 0) for found in (away.parameters, away.trained, away.state))
        saved, gradients = away.activations.get(tier, 0), 0 if passes.releases else trained
        forward[0][tier] += micro * parameters
        if not passes.trains:
            continue
        forward[1][tier] += micro * saved
        backward[0][tier] += micro * (saved + (parameters if passes.fetches_again else 0)) + (micro - 1) * gradients
        backward[1][tier] += micro * gradients
        early = trained + int(released * state) if passes.releases else 0
        late = state + trained - early
        backward[0][tier] += early
        backward[1][tier] += early
        step[0][tier] += late + gradients
        step[1][tier] += late
    return forward, backward, step


def _channel_seconds(read: Bytes, written: Bytes, rates: Rates, kind: str) -> dict[str, float]:
    found = {
        "nvme read": _disk_seconds(read.get("nvme", 0), rates.disk_read),
        "nvme write": _disk_seconds(written.get("nvme", 0), rates.disk_write),
    }
    if kind == "cpu":
        copied = read.get("cpu", 0) + written.get("cpu", 0)
        return {**found, "host copies": 2 * copied / rates.memory_bandwidth}
    return {
        **found,
        "host to device": _link_seconds(sum(read.values()), rates.host_to_device),
        "device to host": _link_seconds(sum(written.values()), rates.device_to_host),
    }


def _disk_seconds(size: float, rate: float | None) -> float:
    if not size:
        return 0.0
    if rate is None:
        raise ValueError("the hardware has no rate of a disk that can be the nvme tier; calibrate it with one.")
    return size / rate


def _link_seconds(size: float, link: Link | None) -> float:
    if not size:
        return 0.0
    if link is None:
        raise ValueError("the hardware has no link between host and device; calibrate it on CUDA.")
    return math.ceil(size / PAGE_BYTES) * link.latency_seconds + size / link.bandwidth
