"""Evaluation in which ranks have unequal numbers of batches, as Lightning's sampler for prediction deals them.

Each step of a sharded module gathers parameters, which takes all ranks. One that is out of batches gathers along,
without computing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from lightning_largescale.parallel.gather import gather_along


class UnevenSteps:
    """The steps of one evaluation of a sharded module: a collective to make; call `done` after each of this rank's.

    Args:
        module: sharded.
        batches: how many this rank has of each loader, one loader after the other; where a rank does not know, ranks
            must have equal numbers.
    """

    def __init__(self, module: nn.Module, batches: Sequence[int | float]) -> None:
        self._module, self._done = module, 0
        everyone: list[Sequence[int | float]] = [()] * dist.get_world_size()
        dist.all_gather_object(everyone, list(batches))
        self._waits: list[tuple[int, int]] = []
        if all(math.isfinite(count) for counts in everyone for count in counts):
            end = 0
            for own, *others in zip(batches, *everyone, strict=True):
                end += int(own)
                self._waits.append((end, int(max(others) - own)))
        self._gather_along()

    def done(self) -> None:
        """Count one step; after the last of a loader, take part in those that other ranks still have."""
        self._done += 1
        self._gather_along()

    def _gather_along(self) -> None:
        while self._waits and self._waits[0][0] == self._done:
            for _ in range(self._waits.pop(0)[1]):
                gather_along(self._module)
