"""Bytes of a rank's optimizer step: what can be paged, what the step moves between tiers, and its temporaries.

Source: Dettmers et al. 2023, "QLoRA", section 3 (paged optimizers).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_largescale.tiers import PAGE_BYTES, page_buffer_bytes

if TYPE_CHECKING:
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.planner.sizes import Sizes

# Bytes of the largest gradient, and of all gradients.
Stepped = tuple[int, int]


class Paging:
    """Paged and unpaged bytes of the optimizers, by group of parameters; parameters in no group are under "".

    Args:
        sizes: the sizes of any plan of the layout.
    """

    def __init__(self, sizes: GroupSizes) -> None:
        self._sizes = sizes
        self._groups = {**sizes.groups, "": sizes.ungrouped_parameters}

    @cached_property
    def state(self) -> dict[str, float]:
        """Bytes of the rank's paged optimizer state, by parameter name; parameters without paged state are left out."""
        found: Counter[str] = Counter()
        for needs in self._sizes.workload.optimizers:
            found.update({name: size - needs.unpaged_bytes.get(name, 0) for name, size in needs.state_bytes.items()})
        every = self._sizes.workload.parameters
        return {one.name: found[one.name] * self._sizes.share_of(one) for one in every if found[one.name]}

    @cached_property
    def unpaged(self) -> dict[str | None, int]:
        """Bytes of the rank's state that cannot be paged, by group; it stays where the parameters are."""
        return {
            name: math.ceil(sum(self._sizes.state_of(one) - self.state.get(one.name, 0) for one in group))
            for name, group in self._groups.items()
        }

    @cached_property
    def stepped(self) -> dict[str | None, Stepped]:
        """Gradient bytes that are stepped on in pages, by group."""
        return {name: self._stepped(name, self.state) for name in self._groups}

    @cached_property
    def stepped_at_once(self) -> dict[str | None, Stepped]:
        """Gradient bytes that are stepped on at once, because their parameters have no paged state, by group."""
        others = {one.name for group in self._groups.values() for one in group} - self.state.keys()
        return {name: self._stepped(name, others) for name in self._groups}

    @cached_property
    def undivided(self) -> dict[str | None, tuple[int, int]]:
        """Bytes of the largest gradient and of the most state among parameters that cannot be split, by group.

        A page holds all of such a parameter, because its optimizer's step needs that.
        """
        needing = {
            name for needs in self._sizes.workload.optimizers if not needs.divisible for name in needs.state_bytes
        }
        whole = {name: size for name, size in self.state.items() if name in needing}
        return {
            name: (
                self._stepped(name, whole)[0],
                math.ceil(max((whole.get(one.name, 0) for one in group), default=0)),
            )
            for name, group in self._groups.items()
        }

    def _stepped(self, name: str | None, among: Container[str]) -> Stepped:
        group = [one for one in self._groups[name] if one.trainable and one.used and one.name in among]
        local = [*map(self._sizes.gradient_of, group)]
        return max(local, default=0), sum(local)


def moved_in_step(sizes: Sizes) -> Mapping[str, int]:
    """Return, by tier, the bytes read for the optimizer's step: state, parameters, and gradients unless released.

    State and parameters are written back.
    """
    moved: Counter[str] = Counter()
    if sizes.workload.stage != "fit":
        return moved
    moved.update(sizes.placement.state)
    for name, tier in sizes.placement.groups.items():
        # A parameter and its gradient have the same bytes.
        moved[tier] += sizes.gradient(name, whole=False) * (1 if sizes.releases else 2)
    return moved


def page_buffers(sizes: Sizes) -> int:
    """Return the bytes of the device's memory in the page buffers of the optimizer's step, which persist across steps.

    On CUDA the buffers are in pinned memory instead, and count as staging.
    """
    return buffer_bytes(sizes.kind, sum(moved_in_step(sizes).values()), largest_page(sizes))


def buffer_bytes(kind: str, moved_bytes: int, page_bytes: int) -> int:
    """Return the bytes of page buffers in the device's memory for `moved_bytes` a step, in pages of `page_bytes`."""
    return page_buffer_bytes(moved_bytes, page_bytes) if kind == "cpu" else 0


def largest_page(sizes: Sizes) -> int:
    """Return the bytes of the largest page; it exceeds `PAGE_BYTES` if it holds a parameter that cannot be split."""
    found = PAGE_BYTES
    for name, (largest, state) in sizes.paging.undivided.items():
        moves = state and (name in sizes.placement.groups or sizes.host_steps)
        found = max(found, state + (largest * (1 if sizes.releases else 2) if moves else 0))
    return found


def temporaries(sizes: Sizes, names: Iterable[str | None]) -> int:
    """Return the peak bytes of temporaries on the device while the optimizer steps on these groups.

    For paged groups they are those of one page; on CUDA the page's state is brought to the device as well. On CUDA the
    host steps on offloaded parameters, which need none.
    """
    in_pages: list[tuple[int, int]] = []
    at_once: list[tuple[int, int]] = []
    paging = sizes.paging
    state, page, page_state = 0, _page_parameter_bytes(sizes), PAGE_BYTES
    for name in names:
        if name in sizes.placement.groups:
            # On the CPU pages hold the parameters too.
            in_pages += [sizes.stepped.get(name, (0, 0))] if sizes.kind == "cpu" else []
        elif not sizes.pages_state:
            at_once.append(sizes.stepped.get(name, (0, 0)))
        else:
            in_pages.append(paging.stepped.get(name, (0, 0)))
            at_once.append(paging.stepped_at_once.get(name, (0, 0)))
            state += sizes.state(name) - paging.unpaged.get(name, 0) if sizes.kind != "cpu" else 0
        largest, largest_state = paging.undivided.get(name, (0, 0))
        page, page_state = max(page, largest), max(page_state, largest_state)
    return max(_temporaries(sizes, at_once, None), _temporaries(sizes, in_pages, page) + min(state, page_state))


def _page_parameter_bytes(sizes: Sizes) -> int:
    """Return the bytes of the parameters that one page updates."""
    state = sum(sizes.paging.state.values())
    if not sizes.pages_state or not state:
        return PAGE_BYTES // (1 if sizes.releases else 2)
    return int(PAGE_BYTES * sum(total for _, total in sizes.paging.stepped.values()) / state)


def _temporaries(sizes: Sizes, groups: list[tuple[int, int]], page: int | None) -> int:
    largest = max((largest for largest, _ in groups), default=0)
    total = sum(total for _, total in groups)
    if page is not None:
        largest, total = min(largest, page), min(total, page)
    return max(
        (
            int(needs.step_temporary_largest * largest + needs.step_temporary_total * total)
            for needs in sizes.workload.optimizers
        ),
        default=0,
    )
