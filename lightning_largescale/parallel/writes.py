"""Copy the user code's writes into gathered parameters to the shards before the optimizer steps on them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.compile import traced_modules
from lightning_largescale.parallel.parameter_access import TRACED, Adopted
from lightning_largescale.parallel.watched import ShardStore, Watched
from lightning_largescale.workload.parts import part_of


class Writes:
    """Watches the parameters of a sharded module until `stop`.

    Args:
        groups: the modules that `fully_shard` was applied to, by name.
        average: averages gradients over the ranks.
        set_gradient: assigns a gradient that is not a shard to a parameter.
        computes: returns whether a step runs, or its backward is still to come.
        in_graph: groups that a backward is still to reach.

    Attributes:
        elsewhere: the store that keeps shards in another tier; None if there is none.
        groups: the watched parameters by name of their group.
    """

    def __init__(
        self,
        groups: Mapping[str, nn.Module],
        *,
        average: Average,
        set_gradient: Callable[[Watched, Tensor], None],
        computes: Callable[[], bool],
        in_graph: Collection[nn.Module],
    ) -> None:
        self._stale: set[nn.Module] = set()
        self.elsewhere: ShardStore | None = None
        self.groups: dict[str, list[Watched]] = {}
        self._watching: dict[nn.Module, _WatchedGroup] = {}
        self._undo = contextlib.ExitStack()
        every: list[Watched] = []
        traced = {inner for group in groups.values() for inner in traced_modules(group)}
        for name, group in groups.items():
            found = [
                Watched(
                    one,
                    group,
                    elsewhere=lambda: self.elsewhere,
                    others=every,
                    average=average,
                    set_gradient=set_gradient,
                    computes=computes,
                    in_graph=in_graph,
                    stale=self._stale,
                )
                for one in compat.grouped_parameters(group)
            ]
            every += found
            self.groups[name] = found
            watching = self._watching[group] = _WatchedGroup(found, traced, shards=groups[""] not in traced)
            self._undo.callback(
                compat.around_sharding(
                    group, gathered=watching.gathered, resharding=watching.resharding, reducing=watching.reducing
                )
            )

    def keep(self) -> None:
        """Copy writes into gathered leaves to their shards; the leaves stay gathered.

        Raises:
            PlanError: a leaf that was written into has a lower precision than its shard.
        """
        for found in self.groups.values():
            for one in found:
                one.settle()

    def drop_stale(self) -> None:
        """Reshard groups whose shards were written into while they were gathered, so that they are gathered anew."""
        while self._stale:
            cast(FSDPModule, self._stale.pop()).reshard()

    @contextlib.contextmanager
    def sharded_in_place(self, group: nn.Module) -> Iterator[None]:
        """Context in which the shards of `group` are in place, even if the group is gathered.

        Raises:
            PlanError: a parameter of the group was replaced.
        """
        watching = self._watching[group]
        if not watching.is_gathered:
            yield
            return
        watching.check_places()
        with compat.sharded_in_place(group):
            yield
            watching.check_places()

    def forget(self) -> None:
        """Discard the writes into gathered leaves."""
        for found in self.groups.values():
            for one in found:
                if one.one.is_gathered:
                    one.look()

    def stop(self) -> None:
        """Stop watching."""
        self._undo.close()


class _WatchedGroup:
    """The watched parameters of one FSDP group, with the hooks around its unshard, reshard and reduction.

    Args:
        parameters: the parameters of the group.
        traced: modules that torch.compile traces, where parameters must be of torch's own classes.
        shards: whether to watch shards, which torch.compile must not trace.
    """

    def __init__(self, parameters: Sequence[Watched], traced: Collection[nn.Module], *, shards: bool) -> None:
        self._parameters, self._traced, self._shards = parameters, traced, shards
        self._adopt()

    @property
    def is_gathered(self) -> bool:
        """Return whether the leaves are in place of the shards."""
        return bool(self._parameters) and self._parameters[0].one.is_gathered

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Context around the replacement of the shards by the leaves."""
        self.check_places()
        yield
        self._adopt()
        for one in self._parameters:
            one.look()

    def resharding(self) -> None:
        """Hook before the shards replace the leaves."""
        self.check_places()
        for one in self._parameters:
            one.settle()

    @contextlib.contextmanager
    def reducing(self) -> Iterator[None]:
        """Context while FSDP2 reduces the gradients of the leaves."""
        for one in self._parameters:
            one.settle()
            one.reducing = True
        try:
            yield
        finally:
            for one in self._parameters:
                one.reducing = False

    def _adopt(self) -> None:
        for one in self._parameters:
            traced = any(module in self._traced for module, _ in one.one.places)
            one.adopt(leaf=not traced, shard=self._shards)
            if traced and one.one.leaf is not None:
                vars(one.one.leaf)[TRACED] = True

    def check_places(self) -> None:
        """Make sure that the modules still have the group's leaves or shards.

        Raises:
            PlanError: a parameter was replaced.
        """
        # After a failed step, leftovers are cleaned up without this check; loops end with a StopIteration.
        if sys.exc_info()[0] not in (None, StopIteration):
            return
        for one in self._parameters:
            known = one.one.leaf, one.one.shard
            for module, name in one.one.places:
                if isinstance(module, Adopted):
                    continue
                found = compat.own_tensors(module)[0].get(name)
                # Tensor parallelism puts local shards there.
                if not any(found is parameter for parameter in known) and part_of(found) is None:
                    raise PlanError(
                        f"{one.one.name!r} was replaced, by functional_call or an assignment, and what gathers it puts"
                        " its own parameter there; write into it (`parameter.data = ...`), call what is to compute with"
                        " others on a module that was not sharded, or replicate with dp_replicate."
                    )
