"""Remedy of a technique: how it makes a plan fit that does not, and how much of it the offload solver may choose.

An amount is in one of three units, so that the solver names no technique: groups of parameters and pages of optimizer
state, of which some may stay on the device, and blocks, of which some may have their activations taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_largescale.planner.price import Fields

if TYPE_CHECKING:
    from lightning_largescale.hardware import Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.offload_search import Offloading
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload

# Bytes of an amount that is all there is, and of a tier that has room for anything.
UNLIMITED = 2**63
# Bytes at the worst moment that a remedy can take off it, and how often each byte is read and written in a step.
Removable = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstMoment:
    """The moment at which a plan is largest, and what the remedies together do to it.

    Attributes:
        workload: the traced step.
        plan: the plan, which offloads nothing.
        kind: the kind of the devices.
        accumulate: micro-batches in a step.
        terms: bytes by term.
        holes: bytes that each byte that comes and goes takes, with its share of the fragmentation.
        moves_groups: whether groups of parameters leave the device.
        frees_gradients: whether gradients are freed in backward.
    """

    workload: Workload
    plan: Plan
    kind: str
    accumulate: int
    terms: Mapping[str, int]
    holes: float
    moves_groups: bool
    frees_gradients: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The amounts that stay on the device, and that leave it.

    Attributes:
        groups: number of parameter groups that stay, counted from the last.
        blocks: number of blocks whose activations are offloaded, or that recompute, counted from the first.
        state_bytes: bytes of optimizer state that stay.
    """

    groups: int = 0
    blocks: int = 0
    state_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Assigned:
    """The groups, activations and state that leave the device under a choice, and the tiers they go to.

    Attributes:
        groups: names of the groups that leave.
        groups_in_dram: those of them that go to DRAM.
        blocks: names of the blocks whose activations are taken from the device.
        blocks_tier: the tier of these activations.
        state_bytes: bytes of optimizer state that stay.
        state_in_dram: bytes of optimizer state that go to DRAM.
        state_on_disk: bytes of optimizer state that go to a disk.
    """

    groups: Sequence[str] = field(default=())
    groups_in_dram: Sequence[str] = field(default=())
    blocks: tuple[str, ...] = ()
    blocks_tier: str = "nvme"
    state_bytes: int = 0
    state_in_dram: int = 0
    state_on_disk: int = 0


class Remedy:
    """One remedy as the solver sees it; the defaults are those of one that moves nothing.

    Attributes:
        name: the name of the remedy.
        unit: the unit of its amount; None if it has none.
        recomputes: whether blocks are recomputed: it then takes compute, not transfers.
        frees_gradients: whether gradients are freed in backward.
    """

    name: str
    unit: Literal["groups", "blocks", "pages"] | None = None
    recomputes = False
    frees_gradients = False

    def may_help(self, plan: Plan, search: Offloading) -> bool:
        """Return whether `plan` may be combined with the remedy, and gains by it."""
        raise NotImplementedError

    def moves_state(self, kind: str) -> bool:
        """Return whether optimizer state leaves the device with it, on devices of `kind`."""
        return self.unit == "pages"

    def fields(self, sizes: Sizes, assigned: Assigned) -> Fields:
        """Return the plan fields of the amounts in `assigned`; `sizes` are those of a plan that offloads nothing."""
        raise NotImplementedError

    def fields_of_all(self, workload: Workload, tier: str) -> Fields:
        """Return the plan fields of the remedy with all that it can take, to `tier`."""
        raise NotImplementedError

    def fields_of_none(self, tier: str) -> Fields:
        """Return the plan fields of the remedy while all that it could move to `tier` stays."""
        return {}

    def removable(self, worst: WorstMoment) -> Removable | None:
        """Return what the remedy can take off the worst moment; None if that takes compute."""
        return None

    def byte_seconds(self, sizes: Sizes, rates: Rates) -> float | None:
        """Return the least seconds of recomputation for each byte of activations that this frees; None if none is.

        Args:
            sizes: the sizes of a plan under which all blocks recompute.
            rates: the rates of the hardware.
        """
        return None

    def most_staging(self, sizes: Sizes, groups: Sequence[str], blocks: Sequence[str]) -> int:
        """Return an upper bound of the bytes of its staging buffers in DRAM if these groups and blocks leave."""
        return 0

    def steppers(self, sizes: Sizes) -> tuple[bool, ...]:
        """Return who may step on offloaded state: the device (False), the host (True)."""
        return (False,)

    def stepper_fields(self, *, by_host: bool) -> Fields:
        """Return the plan fields that say who steps."""
        return {}
