"""Look-ups in tables whose rows lie on several ranks, and the way back of their gradients.

Ranks meet in rounds. In each of them every rank says which table it looks up, and how many rows of each rank it wants,
or that it is done; the first table of those named is served, and ranks that named another, or none, take part with no
rows. So ranks may look up different tables, or none, and a step ends when all are done; so does what comes before other
collectives of it, which ranks may only enter together. Gradients stay with the rank that computed them until its
backward is over: then rows go to their owners, once for every table.

Source: Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    section 3 (model parallelism of tables: personalised all-to-all).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_largescale import comm, compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.rows import Rows, mark_rows, sparse_rows
from lightning_largescale.workload.parts import share

_DONE = -1
# What may be wrong with ids that a rank was given, as ranks say it to one another.
_NO_SUCH_ROW, _NO_IDS = 1, 2
_DTYPES = sorted({str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)})


@dataclass(eq=False, kw_only=True)
class Table:
    """One table and what its backward has left to be sent.

    Attributes:
        name: of its module.
        module: that has this rank's rows as its `weight`, of shape (local rows, dim).
        rows: which these are.
        padding_idx: the row that gets no gradient, if there is one.
        aside: this rank's rows while the module has the whole table in their place, for a block of code.
        pending: row numbers (k) and gradients (k, dim) that a backward under way has computed, of any rank's rows.
        kept: the sum of those of backwards that are over and wait for the last one before the optimizer's step.
    """

    name: str
    module: nn.Module
    rows: Rows
    padding_idx: int | None = None
    aside: nn.Parameter | None = None
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> nn.Parameter:
        """This rank's rows."""
        if self.aside is not None:
            return self.aside
        weight: nn.Parameter = own_parameters(self.module)["weight"]
        return weight

    def keep_gradient(self, ids: Tensor, gradient: Tensor) -> None:
        """Keep the gradient (k, dim) of the rows `ids` (k), dense or sparse, until it is sent."""
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            ids, gradient = ids[gradient.indices()[0]], gradient.values()
        if self.padding_idx is not None:
            trained = ids != self.padding_idx
            ids, gradient = ids[trained], gradient[trained]
        self.pending.append((ids, gradient))


class Lookups:
    """The tables of a module and what their ranks say to one another; all methods that communicate are collectives.

    Args:
        tables: the same on all ranks.
        device: of this rank.

    Attributes:
        tables: as given.
        synchronize: whether the next backward sends its gradients.
        stepping: a step of the module runs.
        before_late: called before look-ups that follow what ranks did together otherwise, which only those of all ranks
            can.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        self.tables, self._device = list(tables), device
        self.synchronize, self.stepping = True, False
        self.before_late: Callable[[], None] = lambda: None
        # Of their own, since a backward reduces other gradients at the same time.
        self._group = dist.new_group()
        self._ranks = comm.world_size()
        # Whether other ranks may be looking up what this one has not joined.
        self._apart = True

    def serves(self, names: Sequence[str], ranks: int) -> bool:
        """Whether these are tables of a plan that names `names`, on `ranks` ranks.

        Raises:
            PlanError: they are on another number of ranks.
        """
        if ranks != self._ranks:
            raise PlanError(
                f"table {self.tables[0].name!r} is divided among {self._ranks} processes and this Trainer has {ranks};"
                " first call `trainer.strategy.make_whole()` of the other Trainer on all ranks."
            )
        return [table.name for table in self.tables] == [*names]

    def look_up(self, table: Table, ids: Tensor) -> Tensor:
        """Rows (k, dim) of a table.

        Args:
            table: one of `tables`.
            ids: row numbers (k), sorted, each once.

        Raises:
            PlanError: on all ranks, when one of them asks for a row that a table has not.
        """
        wanted, fault = self.tables.index(table), self._out_of_range(table, ids)
        counts = self._counts(table, ids)
        if not self._apart:
            self.before_late()
        self._apart = True
        while True:
            served, rows = self._round(wanted, ids, counts, fault)
            if served == wanted:
                return rows

    def refuse(self, table: Table, dtype: torch.dtype) -> None:
        """Refuse what is no row numbers of `table`, being of `dtype`.

        Raises:
            PlanError: on all ranks.
        """
        fault = (_NO_IDS, _DTYPES.index(str(dtype)))
        self._round(self.tables.index(table), self._no_ids(), [0] * self._ranks, fault)

    def join(self) -> None:
        """Take part in the look-ups of ranks that still have some, until all are done.

        Raises:
            PlanError: as `look_up`.
        """
        while self._round(_DONE, self._no_ids(), [0] * self._ranks)[0] != _DONE:
            pass
        self._apart = False

    def look_up_along(self) -> None:
        """Announce that others look up rows after what ranks did together otherwise: `meet` takes part in it."""
        self._apart = True

    def start(self) -> None:
        """Announce a step of the module."""
        self.stepping = self._apart = True

    def meet(self) -> None:
        """The same, before what ranks do together otherwise: once in each forward, and after look-ups that follow."""
        if self._apart:
            self.join()

    def end_backward(self) -> None:
        """Send gradients to the ranks that have the rows, average them there as data parallelism does, and add them to
        `weight.grad`, sparse and coalesced; unless `synchronize` is off: then they are kept.
        """
        self._apart = True
        for table in self.tables:
            pieces = [*([table.kept] if table.kept else []), *table.pending]
            table.kept, table.pending = _summed(pieces) if pieces else None, []
        if not self.synchronize:
            return
        said = [self._sends(table) for table in self.tables]
        header = torch.tensor([[number for one in said for number in one[rank]] for rank in range(self._ranks)])
        heard = self._told(header.to(self._device))
        for index, table in enumerate(self.tables):
            touched = [row[2 * index + 1] for row in heard]
            if any(touched):
                sends = [one[0] for one in said[index]]
                self._reduce(table, sends, [row[2 * index] for row in heard])
            table.kept = None

    def check_sent(self) -> None:
        """Refuse to go on where a backward was not announced: its gradients are still here.

        Raises:
            PlanError: a table has gradients that no rank was sent.
        """
        for table in self.tables:
            if table.pending:
                raise PlanError(
                    f"table {table.name!r} has gradients of a backward that the Trainer does not know of, and its rows"
                    " are on all ranks; call self.manual_backward(loss) in the place of loss.backward(), and ask"
                    " torch.autograd.grad for the gradient of no table."
                )

    def forget(self) -> None:
        """Drop gradients that were not sent, after a step that ended halfway."""
        self.stepping = False
        for table in self.tables:
            table.kept, table.pending = None, []

    def end(self) -> None:
        """Leave the group that ranks met in; no other method is called after it."""
        # Unless it ended with all others, before a Trainer that came later.
        with contextlib.suppress(ValueError):
            dist.destroy_process_group(self._group)

    def _round(
        self, wanted: int, ids: Tensor, counts: list[int], fault: tuple[int, int] = (0, 0)
    ) -> tuple[int, Tensor]:
        """One round: which table is served, and its rows `ids` where it is the one that is wanted."""
        header = torch.tensor([[wanted, *fault, count] for count in counts], device=self._device)
        heard = self._told(header)
        for other, wrong, value, _ in heard:
            if wrong:
                raise _error(self.tables[other], wrong, value)
        served = min((other for other, *_ in heard if other != _DONE), default=_DONE)
        if served == _DONE:
            return served, ids
        table, asks = self.tables[served], served == wanted
        sends = counts if asks else [0] * self._ranks
        asked = [count if other == served else 0 for other, _, _, count in heard]
        theirs = self._exchanged(ids if asks else ids[:0], sends, asked)
        rows = table.weight.detach()[theirs - table.rows.start]
        return served, self._exchanged(rows, asked, sends)

    def _reduce(self, table: Table, sends: list[int], comes: list[int]) -> None:
        weight = table.weight
        ids, gradient = table.kept or _nothing(weight)
        ids, gradient = self._exchanged(ids, sends, comes), self._exchanged(gradient, sends, comes)
        ids, gradient = _summed([(ids - table.rows.start, gradient)])
        grad = sparse_rows(ids, gradient / self._ranks, weight.shape)
        # Through autograd, so that the parameter's hooks are called.
        torch.autograd.backward([weight], [grad])
        assert weight.grad is not None
        weight.grad = mark_rows(weight.grad.coalesce(), table.rows)

    def _sends(self, table: Table) -> list[tuple[int, int]]:
        """By rank, how many rows of the gradient it is sent, and whether there is one at all."""
        if table.kept is None:
            return [(0, 0)] * self._ranks
        return [(count, 1) for count in self._counts(table, table.kept[0])]

    def _counts(self, table: Table, ids: Tensor) -> list[int]:
        """How many of `ids`, sorted, lie on each rank."""
        starts = [share(table.rows.rows, rank, self._ranks)[0] for rank in range(1, self._ranks)]
        cuts = torch.searchsorted(ids, torch.tensor(starts, device=ids.device)).tolist()
        return [end - start for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]

    def _out_of_range(self, table: Table, ids: Tensor) -> tuple[int, int]:
        """Whether one of `ids`, sorted, is none of the table's, and that one."""
        if not len(ids):
            return 0, 0
        first, last = ids[[0, -1]].tolist()
        wrong = first if first < 0 else last
        return 0 if 0 <= wrong < table.rows.rows else _NO_SUCH_ROW, wrong

    def _no_ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self._device)

    def _told(self, header: Tensor) -> list[list[int]]:
        """What each rank says to this one: rows of integers, of `header` the one for it."""
        heard = torch.empty_like(header)
        dist.all_to_all_single(heard, header, group=self._group)
        rows: list[list[int]] = heard.tolist()
        return rows

    def _exchanged(self, tensor: Tensor, sends: list[int], comes: list[int]) -> Tensor:
        """What ranks send, in their order, `tensor` going to them in theirs."""
        received = tensor.new_empty((sum(comes), *tensor.shape[1:]))
        dist.all_to_all_single(received, tensor.contiguous(), comes, sends, group=self._group)
        return received


def own_parameters(module: nn.Module) -> MutableMapping[str, Any]:
    """The parameters that `module` itself holds, by name; writing into it replaces them by any tensor."""
    return compat.own_tensors(module)[0]


def _error(table: Table, wrong: int, value: int) -> PlanError:
    if wrong == _NO_IDS:
        return PlanError(f"table {table.name!r} was given ids of {_DTYPES[value]}; give torch.int64 or torch.int32.")
    return PlanError(
        f"table {table.name!r} has {table.rows.rows} rows and was given id {value}; ids must be 0 to"
        f" {table.rows.rows - 1}."
    )


def _summed(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row numbers sorted, each once, and the sum of the gradients of each."""
    ids, places = torch.unique(torch.cat([ids for ids, _ in pieces]), return_inverse=True)
    gradients = torch.cat([gradient for _, gradient in pieces])
    return ids, gradients.new_zeros((len(ids), *gradients.shape[1:])).index_add_(0, places, gradients)


def _nothing(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.int64, device=weight.device), weight.new_empty((0, *weight.shape[1:]))
