"""Seconds that bytes take between tiers in one optimizer step, and how much of them runs under compute.

What a CUDA device has away and the host's cores step on does not cross the link for that: gradients came to DRAM with
backward, or are copied there with the parameters.

A pass fetches the blocks it needs ahead and sends away what is no longer needed while others compute, so it lasts as
long as the slowest of what is busy: its compute, the disk, or one direction of the link between host and device.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 4 (bandwidth that is needed) and 5.2 (overlap); Ren et al.
    2021, "ZeRO-Offload", section 4 (the step on the host).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_largescale.hardware import Link, Rates
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.tiers import PAGE_BYTES

# What carries bytes between tiers, as the terms of a step name it.
CHANNELS = ("nvme read", "nvme write", "host to device", "device to host", "host copies")
# What a step takes longer by where the host's cores make some of it.
HOST_STEP = "step on the host"
# Before a tier: what the host reads and writes there for itself, and does not cross the link.
_BY_HOST = "host "
Bytes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Away:
    """What one rank keeps in other tiers, bytes by tier.

    Attributes:
        parameters: shards of the groups that leave.
        trained: of these, those that are stepped on; their gradients have as many bytes.
        state: of optimizers.
        activations: saved by one micro-batch.
        by_host: of `state`, what the host's cores step on; on CUDA only, as the next.
        copied: bytes of parameters that are copied from the device for that, and back, wherever their state is; their
            gradients have as many.
    """

    parameters: Bytes = field(default_factory=dict)
    trained: Bytes = field(default_factory=dict)
    state: Bytes = field(default_factory=dict)
    activations: Bytes = field(default_factory=dict)
    by_host: Bytes = field(default_factory=dict)
    copied: int = 0

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
        away = cls(parameters=parameters, trained=trained, state=place.state, activations=activations)
        return away.stepped_on(sizes, by_host=sizes.plan.host_optimizer_step)

    def stepped_on(self, sizes: Sizes, *, by_host: bool) -> Away:
        """The same with what the host's cores step on: the state of parameters that are elsewhere themselves, or all
        that is elsewhere, if `by_host` says so.
        """
        state, trained = sum(self.state.values()), sum(self.trained.values())
        if sizes.kind == "cpu" or not sizes.trained_bytes:
            return self
        of_trained = min(state, sizes.optimizer_state * trained // sizes.trained_bytes)
        on_host = state if by_host else of_trained
        found = {tier: size * on_host // state if state else 0 for tier, size in self.state.items()}
        others = state - of_trained if by_host else 0
        copied = sizes.trained_bytes * others // sizes.optimizer_state if others else 0
        return replace(self, by_host=found, copied=copied)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """What the transfers of a step run beside.

    Attributes:
        forward_seconds: of compute in the forward of all micro-batches.
        backward_seconds: likewise, recomputation included.
        optimizer_seconds: of the arithmetic of the optimizer's step.
        trained_bytes: of the rank's parameters, those that are stepped on.
        root_share: of these, those of the root group, which are never released.
        micro_batches: of one optimizer step.
        trains: False where there is a forward only.
        fetches_again: parameters are fetched in backward once more.
        releases: parameters are stepped on in backward.
    """

    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    trained_bytes: int
    root_share: float
    micro_batches: int
    trains: bool
    fetches_again: bool
    releases: bool

    @classmethod
    def of(cls, sizes: Sizes, terms: Mapping[str, float]) -> Passes:
        """Those of the plan of `sizes`, whose step has these `terms` of compute."""
        trained = sizes.trained_bytes
        fit = sizes.workload.stage == "fit"
        return cls(
            forward_seconds=terms["forward"],
            backward_seconds=terms["backward"] + terms["recomputation"] if fit else 0.0,
            optimizer_seconds=terms["optimizer step"],
            trained_bytes=trained,
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
            copies". And "step on the host": what an optimizer's step takes longer there than on the device.
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
    longer = _longer_by_host(away, passes, rates) if kind == "cuda" else 0.0
    stepped = passes.optimizer_seconds + longer
    busy = (passes.forward_seconds, passes.backward_seconds + released * stepped, (1 - released) * stepped)
    terms: dict[str, float] = defaultdict(float)
    hidden = 0.0
    for compute, (read, written) in zip(busy, _traffic(away, passes, released, kind), strict=True):
        channels = _channel_seconds(read, written, rates, kind)
        disk = channels["nvme read"] + channels["nvme write"]
        slowest = max(disk, *(seconds for name, seconds in channels.items() if not name.startswith("nvme")))
        hidden += sum(channels.values()) - max(0.0, slowest - compute)
        for name, seconds in channels.items():
            terms[name] += seconds
    if longer:
        terms[HOST_STEP] = longer
    return Transfers(terms=dict(terms), hidden_seconds=hidden)


def _longer_by_host(away: Away, passes: Passes, rates: Rates) -> float:
    """What stepping on some on the host takes longer than on the device: as the memory of the two differs."""
    on_host = sum(away.trained.values()) + away.copied
    if not on_host or not passes.trains:
        return 0.0
    if rates.host_memory_bandwidth is None:
        raise ValueError("the hardware has no bandwidth of the host's memory; calibrate it on CUDA.")
    share = min(1.0, on_host / passes.trained_bytes)
    return passes.optimizer_seconds * share * max(0.0, rates.memory_bandwidth / rates.host_memory_bandwidth - 1)


_Traffic = tuple[Bytes, Bytes]


def _traffic(away: Away, passes: Passes, released: float, kind: str) -> tuple[_Traffic, _Traffic, _Traffic]:
    """Bytes read from each tier, and written to it, in forward, in backward, and in the optimizer's step."""
    forward, backward, step = ((Counter[str](), Counter[str]()) for _ in range(3))
    micro, host = passes.micro_batches, _BY_HOST if kind == "cuda" else ""
    for tier in {*away.parameters, *away.state, *away.activations}:
        parameters, trained, state = (found.get(tier, 0) for found in (away.parameters, away.trained, away.state))
        saved, gradients = away.activations.get(tier, 0), 0 if passes.releases else trained
        forward[0][tier] += micro * parameters
        if not passes.trains:
            continue
        forward[1][tier] += micro * saved
        backward[0][tier] += micro * (saved + (parameters if passes.fetches_again else 0))
        backward[0][host + tier] += (micro - 1) * gradients
        backward[1][tier] += micro * gradients
        if passes.releases and kind == "cuda":
            # What is released is stepped on in DRAM, wherever the parameters go from there.
            backward[1]["cpu"] += trained
        by_host = away.by_host.get(tier, 0)
        for place, moved, early in (
            (host + tier, by_host + trained, trained + int(released * by_host)),
            (tier, state - by_host, int(released * (state - by_host))),
        ):
            early = early if passes.releases else 0
            for direction in (0, 1):
                backward[direction][place] += early
                step[direction][place] += moved - early
        step[0][host + tier] += gradients
    early = int(released * away.copied)
    for when, copied in ((backward, early), (step, away.copied - early)):
        when[0]["cpu"] += copied
        when[1]["cpu"] += 2 * copied
    return forward, backward, step


def _channel_seconds(read: Bytes, written: Bytes, rates: Rates, kind: str) -> dict[str, float]:
    from_disk, to_disk = (found.get("nvme", 0) + found.get(f"{_BY_HOST}nvme", 0) for found in (read, written))
    found = {
        "nvme read": _disk_seconds(from_disk, rates.disk_read),
        "nvme write": _disk_seconds(to_disk, rates.disk_write),
    }
    if kind == "cpu":
        copied = read.get("cpu", 0) + written.get("cpu", 0)
        return {**found, "host copies": 2 * copied / rates.memory_bandwidth}
    up, down = (sum(size for tier, size in found.items() if not tier.startswith(_BY_HOST)) for found in (read, written))
    return {
        **found,
        "host to device": _link_seconds(up, rates.host_to_device),
        "device to host": _link_seconds(down, rates.device_to_host),
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
