"""Offload amounts of one layout: those that make it fit, and the cheapest of them.

A choice has three amounts: the number of parameter groups that stay on the device, the number of blocks whose
activations are offloaded, and the number of optimizer-state pages that stay. Each amount adds its own bytes to every
moment of a step, so the moments of any choice are sums of the moments of a few.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_largescale.planner.paging import buffer_bytes, largest_page, moved_in_step
from lightning_largescale.planner.peak_memory import allocator_share, moments_bytes
from lightning_largescale.planner.placement import state_that_may_stay, state_without_pages
from lightning_largescale.planner.remedy import UNLIMITED, Choice
from lightning_largescale.planner.runtime import beside_transfers
from lightning_largescale.planner.spread import REMEDIES, Spread, in_unit, recomputes, spread
from lightning_largescale.planner.transfers import Away, Passes, transfers
from lightning_largescale.tiers import PAGE_BUFFERS, PAGE_BYTES

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.sizes import Sizes

# Number of values tried of one amount, evenly spaced; the best choice is then refined to the least that fits.
_MOST_VALUES = 12
Moments = list[tuple[int, int]]


class Layout:
    """One layout of ranks, with the quantities that all offload choices share."""

    def __init__(self, sizes: Sizes, hardware: Hardware, budgets: Mapping[str, int], **setup: Any) -> None:
        """Create the layout of the plan of `sizes`, which offloads nothing.

        Args:
            sizes: the sizes of that plan; they gather parameters if parameters are to be offloaded.
            hardware: the hardware, with rates.
            budgets: bytes of each tier, the device's included.
            setup: `baseline_bytes` and `built`, as for `peak_memory`.
        """
        self.sizes, self.hardware, self.budgets, self._setup = sizes, hardware, budgets, setup
        self._moments: dict[object, Moments] = {}

    def without(self, remedies: frozenset[str], choice: Choice) -> Sizes:
        """Return the sizes with these amounts outside the device's memory, in any tier."""
        tiers = {"nvme" if self.sizes.kind == "cpu" else "cpu": UNLIMITED}
        found = spread(self.sizes, remedies, choice, tiers)
        assert found is not None
        return self.sizes.placing(found.plan)

    def moments(self, remedies: frozenset[str], choice: Choice) -> Moments:
        """Return, for each moment, the bytes of all terms except the allocator's, and of those that come and go."""
        of_blocks = in_unit(remedies, "blocks")
        groups = choice.groups if in_unit(remedies, "groups") else 0
        found = self._found(remedies - of_blocks, Choice(groups=groups))
        if not of_blocks:
            return found
        plain, saved = self._found(frozenset(), Choice()), self._found(of_blocks, Choice(blocks=choice.blocks))
        return [
            (total + other - base, moving + other_moving - base_moving)
            for (total, moving), (other, other_moving), (base, base_moving) in zip(found, saved, plain, strict=True)
        ]

    def _found(self, remedies: frozenset[str], choice: Choice) -> Moments:
        key = remedies, choice
        if key not in self._moments:
            sizes = self.without(remedies, choice) if remedies else self.sizes
            self._moments[key] = moments_bytes(sizes, **self._setup)
        return self._moments[key]


class Amounts:
    """The amounts that a set of remedies allows under one layout."""

    def __init__(self, layout: Layout, remedies: frozenset[str]) -> None:
        """Create the amounts of `remedies`, of which at most one has an amount in blocks."""
        self.layout, self.remedies = layout, remedies
        sizes = layout.sizes
        self._groups = len(sizes.movable) if in_unit(remedies, "groups") else 0
        self._blocks = len(sizes.workload.blocks) if in_unit(remedies, "blocks") else 0
        if recomputes(remedies):
            # Recomputing all blocks is a layout of its own.
            self._blocks -= 1
        paged = sizes.optimizer_state - state_without_pages(sizes, ())
        self._state = paged if in_unit(remedies, "pages") else 0
        self._beside: dict[int, tuple[float, Passes]] = {}
        # The bytes at setup and at the worst moment after it, with no state resident.
        self._peaks: dict[Choice, tuple[int, int]] = {}
        self._moved_by_groups: dict[int, tuple[int, int]] = {}
        paging = [REMEDIES[name] for name in in_unit(remedies, "pages") if self._state]
        self._paging = paging[0] if paging else None
        # The choice that offloads all that can be.
        self.least = Choice(blocks=self._blocks)

    def best(self) -> tuple[Plan, float] | None:
        """Return the fastest plan that fits every tier and its step seconds; None if none fits."""
        # Paging less shrinks the page buffers, and nothing else.
        if self._excess(self.least) > self._buffers(self.least):
            return None
        found = [(seconds, choice) for choice in self._tried() if (seconds := self._seconds(choice)) is not None]
        if not found:
            return None
        _, choice = min(found, key=lambda row: row[0])
        drawn_out = self._drawn_out(choice)
        placed = self._spread(drawn_out)
        assert placed is not None
        seconds, by_host = self._priced(drawn_out, placed)
        fields = self._paging.stepper_fields(by_host=by_host) if self._paging else {}
        return dataclasses.replace(placed.plan, **fields), seconds

    def plan(self, choice: Choice) -> Plan | None:
        """Return a plan of these amounts; None if the other tiers lack the room."""
        found = self._spread(choice)
        return None if found is None else found.plan

    def _spread(self, choice: Choice) -> Spread | None:
        return spread(self.layout.sizes, self.remedies, choice, self.layout.budgets)

    def _tried(self) -> Iterator[Choice]:
        """Yield choices that fit the device, each with as much resident state as fits."""
        for groups in _values(0, max(0, self._groups - 1)):
            for blocks in _values(min(1, self._blocks), self._blocks):
                choice = Choice(groups=groups, blocks=blocks)
                if self._excess(choice) <= 0:
                    yield self._with_state(choice)

    def _drawn_out(self, choice: Choice) -> Choice:
        """Return `choice` with as few groups, blocks and pages offloaded as possible."""
        before = None
        # Keeping more of one amount makes room for another, because less is in flight.
        while choice != before:
            before = choice
            while choice.blocks > 1 and self._fits(less := dataclasses.replace(choice, blocks=choice.blocks - 1)):
                choice = less
            while choice.groups + 1 < self._groups and self._fits(
                less := dataclasses.replace(choice, groups=choice.groups + 1)
            ):
                choice = less
        return self._with_state(choice)

    def _fits(self, choice: Choice) -> bool:
        return self._excess(choice) <= 0 and self._seconds(choice) is not None

    def _excess(self, choice: Choice) -> int:
        """Return by how many bytes the device's peak exceeds its budget, with the buffers of what is still paged."""
        amounts = _staying(choice, 0)
        if amounts not in self._peaks:
            share, moments = self._share, self.layout.moments(self.remedies, amounts)
            setup, *steps = (total + int(share * moving) for total, moving in moments)
            self._peaks[amounts] = setup, max(steps, default=0)
        setup, most = self._peaks[amounts]
        stays = choice.state_bytes + self._buffers(choice) - self._buffers(amounts)
        return max(setup, most + stays) - self.layout.budgets["device"]

    def _with_state(self, choice: Choice) -> Choice:
        """Return `choice` with as many resident state pages as fit; at least one leaves, else nothing is paged."""
        if not self._state:
            return choice
        pages = range(self._most_state(choice.groups) // PAGE_BYTES + 1)
        fitting = bisect.bisect_left(
            pages, True, lo=1, key=lambda count: self._excess(_staying(choice, count * PAGE_BYTES)) > 0
        )
        return _staying(choice, (fitting - 1) * PAGE_BYTES)

    def _most_state(self, groups: int) -> int:
        """Return the bytes of state that may stay if `groups` groups stay."""
        sizes = self.layout.sizes
        away = sizes.movable[: max(0, self._groups - groups)]
        return min(self._state - 1, state_that_may_stay(sizes, away) - state_without_pages(sizes, away))

    def _buffers(self, choice: Choice) -> int:
        moved, page = self._moved(choice.groups)
        return buffer_bytes(self.layout.sizes.kind, moved - choice.state_bytes, page)

    def _moved(self, groups: int) -> tuple[int, int]:
        """Return the bytes that the optimizer's step moves if no state stays, and those of the largest page."""
        if groups not in self._moved_by_groups:
            sizes = self.layout.without(self.remedies, Choice(groups=groups, blocks=self._blocks))
            self._moved_by_groups[groups] = sum(moved_in_step(sizes).values()), largest_page(sizes)
        return self._moved_by_groups[groups]

    def _seconds(self, choice: Choice) -> float | None:
        """Return the seconds of a step; None if the other tiers lack the room."""
        found = self._spread(choice)
        if found is None or self.layout.hardware.rates is None:
            return None
        seconds, _ = self._priced(choice, found)
        return seconds

    def _priced(self, choice: Choice, found: Spread) -> tuple[float, bool]:
        """Return the seconds of a step, and whether the host steps on what is offloaded, whichever is faster."""
        rates, sizes = self.layout.hardware.rates, self.layout.sizes
        assert rates is not None
        seconds, passes = self._without_transfers(choice.blocks)
        moved: list[tuple[float, bool]] = []
        steppers: tuple[bool, ...] = (False,)
        if self._paging is not None and self._has_room_for_copies(found.away):
            steppers = self._paging.steppers(sizes)
        for by_host in steppers:
            away = found.away.stepped_on(sizes, by_host=by_host)
            moved.append((transfers(away, passes, rates, sizes.kind).step_seconds, by_host))
        least, by_host = min(moved)
        return seconds + least, by_host

    def _has_room_for_copies(self, away: Away) -> bool:
        """Return whether DRAM has room for the page buffers of a host step beside what it keeps."""
        kept = (away.parameters, away.trained, away.state, away.activations)
        in_dram = sum(sizes.get("cpu", 0) for sizes in kept)
        return in_dram + PAGE_BUFFERS * largest_page(self.layout.sizes) <= self.layout.budgets.get("cpu", 0)

    def _without_transfers(self, blocks: int) -> tuple[float, Passes]:
        """Return the seconds of a step without transfers, and the passes that transfers overlap with."""
        blocks = blocks if recomputes(self.remedies) else self._blocks
        if blocks not in self._beside:
            assert self.layout.hardware.rates is not None
            sizes = self.layout.without(self.remedies, Choice(blocks=blocks))
            terms, hidden_seconds = beside_transfers(sizes, self.layout.hardware, self.layout.hardware.rates)
            self._beside[blocks] = sum(terms.values()) - hidden_seconds, Passes.of(sizes, terms)
        return self._beside[blocks]

    @cached_property
    def _share(self) -> float:
        """Bytes lost to fragmentation for each byte that comes and goes."""
        sizes = self.layout.without(self.remedies, self.least)
        return allocator_share(sizes.plan, sizes.kind)


def _staying(choice: Choice, state_bytes: int) -> Choice:
    return dataclasses.replace(choice, state_bytes=state_bytes)


def _values(first: int, last: int) -> list[int]:
    """Return at most `_MOST_VALUES` evenly spaced integers from `first` to `last`, both included."""
    steps = min(last - first, _MOST_VALUES - 1)
    return [first + (last - first) * step // steps for step in range(steps + 1)] if steps else [first]
