"""The FSDP groups of a module as data-parallel ranks enter them for one another, and the gradients that this leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from lightning_largescale import compat
from lightning_largescale.parallel.average import average_in_place
from lightning_largescale.parallel.parameter_access import GRADIENT
from lightning_largescale.parallel.rounds import Entry, EntryKind, Round


class JoinedGroups:
    """Collectives that this rank enters because another rank wants them, by index of the FSDP group.

    The index after the last group stands for the parameters that FSDP ignores, whose gradients are averaged over all
    processes.

    Args:
        modules: the modules that own the groups, with their names; the root's is empty.
        unsharded: the parameters that FSDP ignores.

    Attributes:
        names: the name of each group.
        collectives: the collectives of each group.
        sizes: the number of parameters by index.
        trained: indices in `unsharded` of gradients to average at the end of this backward.
        expected: the number of backwards that are still to pass each group.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], unsharded: Sequence[nn.Parameter]) -> None:
        self.names = [name for name, _ in modules]
        self.collectives = [compat.GroupCollectives(module) for _, module in modules]
        self._unsharded = list(unsharded)
        self.sizes = [*(group.parameters for group in self.collectives), len(self._unsharded)]
        self.trained: set[int] = set()
        self.reset()

    @property
    def last(self) -> int:
        """The index of the parameters that FSDP ignores."""
        return len(self.collectives)

    def reset(self) -> None:
        """Forget the step before."""
        self.expect_none()
        # Reduced parameters as (group, parameter): without a gradient before; with a gradient of this rank; without a
        # call of their hooks.
        self._fresh, self._given, self._unnoticed = (set[tuple[int, int]]() for _ in range(3))

    def expect(self, name: str) -> None:
        """Expect a backward to pass the group of this name."""
        self.expected[self.names.index(name)] += 1

    def expect_none(self) -> None:
        """Expect no more backwards."""
        self.expected = [0] * self.last

    def offer(self, own: Round, entry: Entry, *, ending: bool, synchronizes: bool) -> None:
        """Announce in `own` the gradients that this rank has, and those that are still to come.

        Args:
            own: this rank's part of the exchange.
            entry: the collective that this rank wants to enter.
            ending: whether this rank's backward has passed all groups.
            synchronizes: whether the backward reduces gradients.
        """
        in_backward = compat.current_node_sequence() is not None
        for index, group in enumerate(self.collectives):
            # A backward passes the root last.
            comes = not in_backward or self.expected[index] > 0 or not self.names[index]
            # Gradients that are reduced outside of a backward were set by hand.
            by_hand = not in_backward and entry.kind is EntryKind.REDUCE and entry.number == index
            if comes and not by_hand and not ending:
                own.await_more(index)
            if group.reduces:
                own.offer(index, group.unreduced())
        if not ending:
            own.await_more(self.last)
        if synchronizes:
            own.offer(self.last, sorted(self.trained))

    def give(self, index: int, parameters: Sequence[int]) -> None:
        """Record that this rank reduces its gradients of some parameters of a group."""
        self._given.update((index, one) for one in parameters)

    def join(self, index: int, parameters: Sequence[int] | None, *, own: bool = True) -> None:
        """Take part in the all-gather of a group, or in the reduction of some of its parameters.

        Args:
            index: the group.
            parameters: the parameters to reduce; None for the all-gather.
            own: whether to reduce this rank's gradients, or zeros in their place.
        """
        if parameters is None:
            self.collectives[index].join_unshard()
        elif index == self.last:
            self.average(parameters)
        else:
            fresh, given = self.collectives[index].reduce(parameters, own=own)
            self._fresh.update((index, one) for one in fresh)
            self.give(index, given)
            change = self._unnoticed.difference_update if own else self._unnoticed.update
            change((index, one) for one in parameters)

    def average(self, indices: Sequence[int]) -> None:
        """Average the gradients of parameters that FSDP ignores over all ranks."""
        for index in indices:
            parameter, place = self._unsharded[index], (self.last, index)
            if index in self.trained:
                self._given.add(place)
            elif GRADIENT.__get__(parameter) is None:
                self._fresh.add(place)
                # An assignment to `grad`, as a user's, would be averaged.
                GRADIENT.__set__(parameter, torch.zeros_like(parameter))
            average_in_place(GRADIENT.__get__(parameter))
        self.trained.difference_update(indices)

    def settle(self, ranks: dist.ProcessGroup) -> None:
        """Drop gradients that no rank has computed, and call the hooks of the others that were reduced without.

        Such gradients are zeros, reduced only because an earlier step had reduced them. A collective of `ranks`.
        """
        given = torch.zeros(len(self.sizes), max(self.sizes), dtype=torch.uint8, device="cpu")
        for place in self._given:
            given[place] = 1
        dist.all_reduce(given, dist.ReduceOp.MAX, ranks)
        unused = {place for place in self._fresh if not given[place]}
        for group, index in unused:
            if group == self.last:
                GRADIENT.__set__(self._unsharded[index], None)
            else:
                self.collectives[group].drop_gradient(index)
        for group, index in sorted(self._unnoticed - unused, reverse=True):
            self.collectives[group].notice_gradient(index)
        self._fresh.clear()
        self._unnoticed.clear()
