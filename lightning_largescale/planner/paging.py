"""Bytes of a rank's optimizer step that can be paged, wherever its state is: the sizes of one layout.

Source: Dettmers et al. 2023, "QLoRA", section 3 (paged optimizers).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_largescale.planner.sizes import Sizes

# Bytes of the largest gradient, and of all gradients.
Stepped = tuple[int, int]


class Paging:
    """Paged and unpaged bytes of the optimizers, by group of parameters; row-sharded tables are under "".

    Args:
        sizes: the sizes of any plan of the layout.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._groups = {**sizes.groups, "": sizes.tables}

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
