"""The ranks of tensor parallelism run the same modules in the same order.

They compute parts of the same samples, with collectives inside of modules: ranks that run different ones (by a random
number of each rank's own, or by its number) would add parts of unlike things, or wait for ever. Unlike data-parallel
ranks they cannot serve one another, so the run ends.

Modules are compared by name as they are entered, in the first step and after any change of what all of them run. In
between each rank compares its own with those of the step before, which costs no communication; a rank that is about to
enter another asks the others, who either are about to do the same, however late, or have gone on as in the step before.
Of the latter it is told by the hub, which knows how far each rank has come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.waiting import PROGRESS, Awaited


class ModuleOrder:
    """Compares the modules that ranks run, until `stop`.

    Args:
        modules: by name.
        ranks: those that compute the same samples, this one among them, in a gloo group of their own.
    """

    def __init__(self, modules: Mapping[str, nn.Module], ranks: dist.ProcessGroup) -> None:
        self._names, self._ranks = list(modules), ranks
        self._followed: dict[str, list[int]] = {}
        self._known: list[int] | None = None
        self._entered: list[int] = []
        self._number, self._step = PROGRESS.begin(), 0
        self._peers = tuple(dist.get_process_group_ranks(ranks))
        self._handles: list[RemovableHandle] = [
            # Ahead of what gathers its parameters.
            module.register_forward_pre_hook(partial(self._enter_module, index), prepend=True)
            for index, module in enumerate(modules.values())
        ]

    def stop(self) -> None:
        """Compare no more."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Know nothing of the steps before."""
        self._followed.clear()
        self._known, self._entered = None, []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of this name, in which modules run in the order of the one before, or in one that all agree on.

        Raises:
            PlanError: they run in different orders.
        """
        self._known, self._entered = self._followed.get(name), []
        self._step += 1
        try:
            yield
            self._enter(len(self._names))
        except BaseException:
            self.forget()
            raise
        self._followed[name] = self._entered
        self._known = None

    def _enter_module(self, index: int, module: nn.Module, args: Any) -> None:
        # What is run again in a backward follows from what ran before.
        if compat.current_node_sequence() is None:
            self._enter(index)

    def _enter(self, index: int) -> None:
        place = len(self._entered)
        self._entered.append(index)
        if self._known is None or place >= len(self._known) or self._known[place] != index:
            self._ask(index, place)
        PROGRESS.passed = self._number, self._step, place + 1

    def _ask(self, index: int, place: int) -> None:
        """Make sure that all ranks are about to enter the same, where this one is not known to."""
        expected, self._known = self._known, None
        others = "no more" if expected is None or place >= len(expected) else self._name(expected[place])
        gone_on = self._differ(self._name(index), f"{others}, as in the step before")
        awaited = Awaited(place=(self._number, self._step, place), ranks=self._peers, otherwise=str(gone_on))
        with compat.without_function_modes(), PROGRESS.asking(awaited):
            found = self._told(index)
        if found != (index, index):
            raise self._differ(*map(self._name, found))

    def _told(self, index: int) -> tuple[int, int]:
        """The least and the greatest index that any rank is about to enter."""
        numbers = torch.tensor([-index, index], device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX, self._ranks)
        return -int(numbers[0]), int(numbers[1])

    def _name(self, index: int) -> str:
        return repr(self._names[index]) if index < len(self._names) else "the end of the step"

    def _differ(self, one: str, other: str) -> PlanError:
        return PlanError(
            f"a rank is about to run {one} where another one, which computes the same samples under tp, runs {other};"
            " let what chooses modules be the same on these ranks (torch's, numpy's and Python's own random numbers"
            " are), or use dp_shard in place of tp."
        )
