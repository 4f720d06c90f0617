"""Check that tensor-parallel ranks run the same modules in the same order.

These ranks compute shards of the same samples, with collectives inside of modules. Ranks that run different modules
(chosen by a rank's own random number, or by the rank) would sum unrelated tensors or deadlock. Unlike data-parallel
ranks they cannot take part in each other's collectives, so the run ends with an error.

In the first step, and after any change of the order, the ranks exchange the index of each module as they enter it. In
other steps each rank compares its order with that of the step before, without communication. A rank that is about to
deviate asks the others. They either are about to enter the same module, possibly later, or have gone on as in the step
before. In that case the hub, which knows each rank's progress, notifies the asking rank.
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
    """Compares the order in which tensor-parallel ranks run modules, until `stop`.

    Args:
        modules: modules by name.
        ranks: a separate gloo group of this rank's tensor-parallel ranks.

    Attributes:
        ranks: the gloo group.
    """

    def __init__(self, modules: Mapping[str, nn.Module], ranks: dist.ProcessGroup) -> None:
        self._names, self.ranks = list(modules), ranks
        self._followed: dict[str, list[int]] = {}
        self._known: list[int] | None = None
        self._entered: list[int] = []
        self._number, self._step = PROGRESS.begin(), 0
        self._peers = tuple(dist.get_process_group_ranks(ranks))
        self._handles: list[RemovableHandle] = [
            # Ahead of the hook that gathers the module's parameters.
            module.register_forward_pre_hook(partial(self._enter_module, index), prepend=True)
            for index, module in enumerate(modules.values())
        ]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Discard the orders of the steps before."""
        self._followed.clear()
        self._known, self._entered = None, []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Context of a step: modules run in the order of the last step of this name, or in one that all ranks share.

        Raises:
            PlanError: the ranks run modules in different orders.
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
        # Modules that are recomputed in backward follow from those that ran in forward.
        if compat.current_node_sequence() is None:
            self._enter(index)

    def _enter(self, index: int) -> None:
        place = len(self._entered)
        self._entered.append(index)
        if self._known is None or place >= len(self._known) or self._known[place] != index:
            self._ask(index, place)
        PROGRESS.passed = self._number, self._step, place + 1

    def _ask(self, index: int, place: int) -> None:
        """Make sure that all ranks are about to enter module `index`, which deviates from the known order."""
        expected, self._known = self._known, None
        others = "no more" if expected is None or place >= len(expected) else self._name(expected[place])
        gone_on = self._differ(self._name(index), f"{others}, as in the step before")
        awaited = Awaited(place=(self._number, self._step, place), ranks=self._peers, otherwise=str(gone_on))
        with compat.without_function_modes(), PROGRESS.asking(awaited):
            found = self._told(index)
        if found != (index, index):
            raise self._differ(*map(self._name, found))

    def _told(self, index: int) -> tuple[int, int]:
        """Return the least and the greatest module index that any rank is about to enter."""
        numbers = torch.tensor([-index, index], device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX, self.ranks)
        return -int(numbers[0]), int(numbers[1])

    def _name(self, index: int) -> str:
        return repr(self._names[index]) if index < len(self._names) else "the end of the step"

    def _differ(self, one: str, other: str) -> PlanError:
        return PlanError(
            f"a rank is about to run {one} where another one, which computes the same samples under tp, runs {other};"
            " let what chooses modules be the same on these ranks (torch's, numpy's and Python's own random numbers"
            " are), or use dp_shard in place of tp."
        )
