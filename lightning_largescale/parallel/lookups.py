"""Look-ups in row-sharded tables, and the exchange of their gradients.

Look-ups run in rounds. In each round every rank announces the table that it looks up and the number of rows that it
wants of each rank, or that it is done. The round serves the announced table with the lowest index; ranks that announced
another table, or none, take part with no rows. So ranks may look up different tables, or none. Rounds go on until all
ranks are done, at the end of a step and before other collectives of the step. Gradients stay on the rank that computed
them until its backward ends; then their rows go to the owner ranks, once per table.

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
# Fault codes for a rank's ids, exchanged in the headers of rounds.
_NO_SUCH_ROW, _NO_IDS = 1, 2
_DTYPES = sorted({str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)})


@dataclass(eq=False, kw_only=True)
class Table:
    """A row-sharded table and its gradients that are not sent yet.

    Attributes:
        name: the name of its module.
        module: the module whose `weight` is this rank's rows, of shape (local rows, dim).
        rows: the position of this rank's rows in the full table.
        padding_idx: the row that gets no gradient, if there is one.
        aside: this rank's rows while the module holds the full table instead, for a block of code.
        pending: row numbers (k) and gradients (k, dim) that the running backward has computed, for any rank's rows.
        kept: the sum of the gradients of finished backwards, kept until the last one before the optimizer's step.
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
        """This rank's rows, as a parameter."""
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
    """The row-sharded tables of a module and their exchanges; all methods that communicate are collectives.

    Args:
        tables: The tables, the same on all ranks.
        device: This rank's device.

    Attributes:
        tables: the tables, as a list.
        synchronize: whether the next backward sends its gradients.
        stepping: whether a step of the module runs.
        before_late: called before look-ups that follow other collectives of the step, in which all ranks have to take
            part.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        self.tables, self._device = list(tables), device
        self.synchronize, self.stepping = True, False
        self.before_late: Callable[[], None] = lambda: None
        # A separate process group, since a backward reduces other gradients at the same time.
        self._group = dist.new_group()
        self._ranks = comm.world_size()
        # Whether other ranks may be in look-ups that this rank has not joined.
        self._apart = True

    def serves(self, names: Sequence[str], ranks: int) -> bool:
        """Return whether these tables are exactly those that a plan names.

        Args:
            names: The plan's table names, in order.
            ranks: The plan's world size.

        Raises:
            PlanError: The tables are sharded over another number of ranks.
        """
        if ranks != self._ranks:
            raise PlanError(
                f"table {self.tables[0].name!r} is divided among {self._ranks} processes and this Trainer has {ranks};"
                " first call `trainer.strategy.make_whole()` of the other Trainer on all ranks."
            )
        return [table.name for table in self.tables] == [*names]

    def look_up(self, table: Table, ids: Tensor) -> Tensor:
        """Return rows (k, dim) of a table.

        Args:
            table: One of `tables`.
            ids: Row numbers (k), sorted and unique.

        Raises:
            PlanError: On all ranks, when one of them asks for a row that its table does not have.
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
        """Refuse ids of `dtype`, which is not an integer type that `table` accepts.

        Raises:
            PlanError: Always, on all ranks.
        """
        fault = (_NO_IDS, _DTYPES.index(str(dtype)))
        self._round(self.tables.index(table), self._no_ids(), [0] * self._ranks, fault)

    def join(self) -> None:
        """Take part in the look-ups of other ranks until all ranks are done.

        Raises:
            PlanError: As for `look_up`.
        """
        while self._round(_DONE, self._no_ids(), [0] * self._ranks)[0] != _DONE:
            pass
        self._apart = False

    def look_up_along(self) -> None:
        """Note that other ranks look up rows after another collective, so that the next `meet` joins them."""
        self._apart = True

    def start(self) -> None:
        """Note that a step of the module starts."""
        self.stepping = self._apart = True

    def meet(self) -> None:
        """Join other ranks' look-ups, if there may be any, before another collective.

        Call it once in each forward, and again after look-ups that follow.
        """
        if self._apart:
            self.join()

    def end_backward(self) -> None:
        """Send gradients to the owners of the rows, unless `synchronize` is off: then keep them.

        The owner averages them over the ranks, as data parallelism does, and adds them to `weight.grad`, sparse and
        coalesced.
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
        """Refuse to go on after a backward without `end_backward`, whose gradients are still pending.

        Raises:
            PlanError: A table has pending gradients.
        """
        for table in self.tables:
            if table.pending:
                raise PlanError(
                    f"table {table.name!r} has gradients of a backward that the Trainer does not know of, and its rows"
                    " are on all ranks; call self.manual_backward(loss) in the place of loss.backward(), and ask"
                    " torch.autograd.grad for the gradient of no table."
                )

    def forget(self) -> None:
        """Drop gradients that were not sent, after a step that was interrupted."""
        self.stepping = False
        for table in self.tables:
            table.kept, table.pending = None, []

    def end(self) -> None:
        """Destroy the process group; no other method may be called afterwards."""
        # All process groups may be destroyed already, before a later Trainer.
        with contextlib.suppress(ValueError):
            dist.destroy_process_group(self._group)

    def _round(
        self, wanted: int, ids: Tensor, counts: list[int], fault: tuple[int, int] = (0, 0)
    ) -> tuple[int, Tensor]:
        """Run one round; return the index of the served table, and its rows `ids` if it is the wanted one."""
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
        """Per rank, the number of gradient rows to send to it, and 1 if the table has a gradient, else 0."""
        if table.kept is None:
            return [(0, 0)] * self._ranks
        return [(count, 1) for count in self._counts(table, table.kept[0])]

    def _counts(self, table: Table, ids: Tensor) -> list[int]:
        """Count the `ids`, sorted, that lie on each rank."""
        starts = [share(table.rows.rows, rank, self._ranks)[0] for rank in range(1, self._ranks)]
        cuts = torch.searchsorted(ids, torch.tensor(starts, device=ids.device)).tolist()
        return [end - start for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]

    def _out_of_range(self, table: Table, ids: Tensor) -> tuple[int, int]:
        """Return `_NO_SUCH_ROW` and an id if the table lacks a row for one of the sorted `ids`; else 0 and any id."""
        if not len(ids):
            return 0, 0
        first, last = ids[[0, -1]].tolist()
        wrong = first if first < 0 else last
        return 0 if 0 <= wrong < table.rows.rows else _NO_SUCH_ROW, wrong

    def _no_ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device=self._device)

    def _told(self, header: Tensor) -> list[list[int]]:
        """Exchange header rows of integers, one for each rank; return the rows that each rank has sent to this one."""
        heard = torch.empty_like(header)
        dist.all_to_all_single(heard, header, group=self._group)
        rows: list[list[int]] = heard.tolist()
        return rows

    def _exchanged(self, tensor: Tensor, sends: list[int], comes: list[int]) -> Tensor:
        """Send `sends[rank]` rows of `tensor` to each rank (all-to-all); return the received rows in rank order."""
        received = tensor.new_empty((sum(comes), *tensor.shape[1:]))
        dist.all_to_all_single(received, tensor.contiguous(), comes, sends, group=self._group)
        return received


def own_parameters(module: nn.Module) -> MutableMapping[str, Any]:
    """Return the parameters that `module` itself holds, by name; an assignment replaces one by any tensor."""
    return compat.own_tensors(module)[0]


def _error(table: Table, wrong: int, value: int) -> PlanError:
    if wrong == _NO_IDS:
        return PlanError(f"table {table.name!r} was given ids of {_DTYPES[value]}; give torch.int64 or torch.int32.")
    return PlanError(
        f"table {table.name!r} has {table.rows.rows} rows and was given id {value}; ids must be 0 to"
        f" {table.rows.rows - 1}."
    )


def _summed(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the sorted unique row numbers, and the sum of the gradients of each."""
    ids, places = torch.unique(torch.cat([ids for ids, _ in pieces]), return_inverse=True)
    gradients = torch.cat([gradient for _, gradient in pieces])
    return ids, gradients.new_zeros((len(ids), *gradients.shape[1:])).index_add_(0, places, gradients)


def _nothing(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(0, dtype=torch.int64, device=weight.device), weight.new_empty((0, *weight.shape[1:]))
