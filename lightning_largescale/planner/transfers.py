"""Seconds of transfers between tiers in one optimizer step, and how many of them overlap with compute.

On CUDA, offloaded state that the host's cores step on does not cross the link: gradients are in DRAM after backward, or
are copied there with the parameters.

A pass prefetches the blocks it needs and offloads what is no longer needed while other blocks compute. So it lasts as
long as the slowest of its compute, the disk, and one direction of the link between host and device.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 4 (bandwidth that is needed) and 5.2 (overlap); Ren et al.
    2021, "ZeRO-Offload", section 4 (the step on the host).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lightning_largescale.tiers import PAGE_BYTES

if TYPE_CHECKING:
    from lightning_largescale.hardware import Link, Rates
    from lightning_largescale.planner.sizes import Sizes

# The channels between tiers, as the terms of a step name them.
CHANNELS = ("nvme read", "nvme write", "host to device", "device to host", "host copies")
# The term for the time that a step takes longer because the host's cores run part of it.
HOST_STEP = "step on the host"
# Prefix of a tier for bytes that the host reads and writes for itself, and that do not cross the link.
_BY_HOST = "host "
Bytes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Away:
    """Bytes that one rank keeps in other tiers, by tier.

    Attributes:
        parameters: parameter shards of the offloaded groups.
        trained: the part of `parameters` that is stepped on; their gradients have as many bytes.
        state: optimizer state.
        activations: activations saved by one micro-batch.
        by_host: the part of `state` that the host's cores step on; CUDA only.
        copied: bytes of parameters that are copied from the device and back for the host's step, wherever their state
            is; their gradients have as many; CUDA only.
    """

    parameters: Bytes = field(default_factory=dict)
    trained: Bytes = field(default_factory=dict)
    state: Bytes = field(default_factory=dict)
    activations: Bytes = field(default_factory=dict)
    by_host: Bytes = field(default_factory=dict)
    copied: int = 0

    @classmethod
    def of(cls, sizes: Sizes) -> Away:
        """Return the bytes that the plan of `sizes` keeps in other tiers."""
        place = sizes.placement
        parameters, trained = Counter[str](), Counter[str]()
        for name, tier in place.groups.items():
            parameters[tier] += sizes.shard(name)
            trained[tier] += sizes.gradient(name, whole=False) if sizes.workload.stage == "fit" else 0
        saved = sum(map(sizes.leaving_of, sizes.step.segments))
        activations = {} if place.activations is None else {place.activations: saved}
        away = cls(parameters=parameters, trained=trained, state=place.state, activations=activations)
        return away.stepped_on(sizes, by_host=sizes.host_steps)

    def stepped_on(self, sizes: Sizes, *, by_host: bool) -> Away:
        """Return a copy with `by_host` and `copied` set.

        The host steps on all offloaded state if `by_host`, else only on the state of offloaded parameters.
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
    """The compute of a step that its transfers may overlap with.

    Attributes:
        forward_seconds: seconds of compute in the forward of all micro-batches.
        backward_seconds: seconds of compute in the backward of all micro-batches, recomputation included.
        optimizer_seconds: seconds of the optimizer's step.
        trained_bytes: bytes of the rank's parameters that are stepped on.
        root_share: share of the root group in `trained_bytes`; its gradients are never released.
        micro_batches: micro-batches of one optimizer step.
        trains: whether there is a backward; False if there is a forward only.
        fetches_again: whether parameters are fetched again in backward.
        releases: whether parameters are stepped on in backward.
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
        """Return the passes of the plan of `sizes`, whose step has these `terms` of compute."""
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
            fetches_again=fit and sizes.plan.gathers_again,
            releases=sizes.releases,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfers:
    """Seconds of transfers between tiers in one optimizer step.

    Attributes:
        terms: seconds by channel: "nvme read", "nvme write"; on CUDA "host to device" and "device to host"; on CPU
            "host copies". And "step on the host": the seconds by which the host's step is slower than the device's.
        hidden_seconds: the part of their sum that overlaps with compute or with another channel.
    """

    terms: Mapping[str, float]
    hidden_seconds: float

    @property
    def step_seconds(self) -> float:
        """Seconds that the transfers add to a step."""
        return sum(self.terms.values()) - self.hidden_seconds


def transfers(away: Away, passes: Passes, rates: Rates, kind: str) -> Transfers:
    """Return the transfers of a step that keeps `away` in other tiers.

    Raises:
        ValueError: `rates` lacks the rate of a tier that is used.

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
    """Return the seconds by which the host's step is slower than the device's, by the ratio of memory bandwidths."""
    on_host = sum(away.trained.values()) + away.copied
    if not on_host or not passes.trains:
        return 0.0
    if rates.host_memory_bandwidth is None:
        raise ValueError("the hardware has no bandwidth of the host's memory; calibrate it on CUDA.")
    share = min(1.0, on_host / passes.trained_bytes)
    return passes.optimizer_seconds * share * max(0.0, rates.memory_bandwidth / rates.host_memory_bandwidth - 1)


_Traffic = tuple[Bytes, Bytes]


def _traffic(away: Away, passes: Passes, released: float, kind: str) -> tuple[_Traffic, _Traffic, _Traffic]:
    """Return the (bytes read, bytes written) by tier in forward, in backward, and in the optimizer's step."""
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
            # Released gradients are stepped on in DRAM, wherever the parameters go from there.
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
