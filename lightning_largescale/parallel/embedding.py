"""Row-sharded embeddings: large tables sharded by rows over all ranks, with look-ups by all-to-all of ids.

A table's `weight` becomes a plain parameter of this rank's rows, a contiguous range as in `torch.chunk`. Its gradient
is sparse, covers the rows that any rank looked up, and is averaged over the ranks. So torch optimizers that take sparse
gradients work unchanged; their state is sharded by rows like the parameter.

Source: Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_largescale import comm
from lightning_largescale.errors import PlanError
from lightning_largescale.forward import Forward
from lightning_largescale.parallel.copies import divided_like
from lightning_largescale.parallel.equal import check_equal_structure
from lightning_largescale.parallel.lookups import Lookups, Table, own_parameters
from lightning_largescale.parallel.rows import Rows, chunk_rows, full_rows, mark_rows, own_rows
from lightning_largescale.workload.blocks import find_blocks, no_such_module
from lightning_largescale.workload.parts import share

_STATE = "_largescale_lookups"
# The dtypes of ids that torch's own look-ups accept.
_IDS = (torch.int64, torch.int32)


def shard_embeddings(module: nn.Module, names: Sequence[str], device: torch.device) -> Lookups:
    """Shard tables of `module` by rows over all ranks: a collective.

    Each rank receives its rows of rank 0's values, on `device`, and frees its full copy. Beside the full tables this
    takes memory for the rank's own rows of one table, and a chunk. A table on the meta device becomes local rows on the
    meta device.

    Args:
        module: The module, the same on every rank but for its values.
        names: Names of submodules that `check_embeddings` accepts.
        device: This rank's device.

    Raises:
        PlanError: The ranks built different modules.
    """
    on_meta = any(module.get_submodule(name).weight.is_meta for name in names)
    if not on_meta:
        check_equal_structure(module)
    tables: list[Table] = []
    for name in names:
        part = module.get_submodule(name)
        whole = part.weight
        assert isinstance(whole, nn.Parameter)
        rows = Rows(whole.shape[0], share(whole.shape[0], comm.rank(), comm.world_size())[0])
        local = nn.Parameter(_scattered(whole.detach(), device), requires_grad=whole.requires_grad)
        own_parameters(part)["weight"] = mark_rows(local, rows)
        padding = part.padding_idx
        assert padding is None or isinstance(padding, int)
        tables.append(Table(name=name, module=part, rows=rows, padding_idx=padding))
    lookups = Lookups(tables, device)
    for table in tables:
        kind = _LookUpBags if isinstance(table.module, nn.EmbeddingBag) else _LookUp
        kind(table, lookups).replace()
    vars(module)[_STATE] = lookups
    return lookups


def row_sharded(module: nn.Module) -> Lookups | None:
    """Return the `Lookups` of the row-sharded tables of `module`; None if it has none."""
    return vars(module).get(_STATE)


def check_embeddings(module: nn.Module, names: Sequence[str], ranks: int, wrapped: Sequence[str] = ()) -> None:
    """Check that these modules can be sharded by rows over `ranks` ranks.

    Args:
        module: The unsharded module.
        names: Names of the tables, from the plan.
        ranks: The plan's world size.
        wrapped: Names of modules that are separate FSDP groups.

    Raises:
        PlanError: A table cannot be sharded; the message gives the reason.
    """
    paths = {name: found for name, found in module.named_modules(remove_duplicate=False) if name}
    tables = [name for name, found in paths.items() if isinstance(found, nn.Embedding | nn.EmbeddingBag)]
    repeated = {*find_blocks(module).values()}
    blocks = [name for name, found in paths.items() if found in repeated]
    for name in names:
        if name not in paths:
            raise no_such_module("row_sharded_embeddings", name, module, tables)
        part, given = paths[name], f"row_sharded_embeddings has {name!r}"
        kinds = (nn.Embedding.forward, nn.EmbeddingBag.forward)
        own = own_parameters(part)
        if type(part).forward not in kinds or "forward" in vars(part) or own.get("weight") is None:
            raise PlanError(
                f"{given}, a {type(part).__name__}; give modules that compute as nn.Embedding or nn.EmbeddingBag do."
            )
        outer = next((outer for outer in [*blocks, *wrapped] if f"{name}.".startswith(f"{outer}.")), None)
        if outer is not None:
            what = "a repeated block" if outer in blocks else "one of extra_fsdp_modules"
            raise PlanError(f"{given}, which lies in {outer!r}, {what}; give tables outside of these.")
        _check_table(module, part, given)
        if own["weight"].shape[0] < ranks:
            raise PlanError(
                f"{given}, of {own['weight'].shape[0]} rows, and there are {ranks} ranks; give tables with a row for"
                " each rank, and leave small ones out."
            )


def check_no_copies(copies: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Refuse copies of a module whose tables are about to be sharded.

    Raises:
        PlanError: There is a copy.
    """
    if any(True for _ in copies):
        raise PlanError(
            f"row_sharded_embeddings={tuple(names)!r} and a callback keeps a copy of the module, such as an average of"
            " its weights, whose tables would stay whole; leave out the callback, or the tables."
        )


def make_tables_whole(module: nn.Module) -> None:
    """Replace row-sharded tables by full ones on the CPU, equal on all ranks: a collective if there are any."""
    lookups = row_sharded(module)
    if lookups is None:
        return
    for table in lookups.tables:
        local = table.weight
        whole = nn.Parameter(full_rows(local, table.rows), requires_grad=local.requires_grad)
        own_parameters(table.module)["weight"] = whole
    _LookUp.restore(module)
    lookups.end()
    del vars(module)[_STATE]


@contextmanager
def whole_tables(module: nn.Module) -> Iterator[None]:
    """Context in which row-sharded tables of `module` are full: a collective.

    Writes into them are kept, and must be the same on all ranks. In a step the tables are read-only, and a loss
    computed from them is differentiated.
    """
    lookups = row_sharded(module)
    tables = [] if lookups is None else [table for table in lookups.tables if table.aside is None]
    stepping = lookups is not None and lookups.stepping
    for table in tables:
        local = table.aside = table.weight
        whole = full_rows(local, table.rows).to(local.device)
        own = own_parameters(table.module)
        if stepping:
            ids = torch.arange(len(whole), device=local.device)
            own["weight"] = _Fetched.apply(local, table, ids, whole)  # type: ignore[no-untyped-call]
        else:
            own["weight"] = nn.Parameter(whole, requires_grad=local.requires_grad)
    try:
        yield
    finally:
        for table in tables:
            own, local = own_parameters(table.module), table.weight
            whole, own["weight"], table.aside = own["weight"], local, None
            if not stepping:
                with torch.no_grad():
                    local.copy_(own_rows(whole.detach(), table.rows))


def _check_table(module: nn.Module, part: nn.Module, given: str) -> None:
    for option, plain in (("max_norm", None), ("scale_grad_by_freq", False)):
        value = getattr(part, option)
        if value != plain:
            raise PlanError(
                f"{given}, with {option}={value!r}, which needs all ids in one place; give tables without it."
            )
    if getattr(part, "mode", "sum") == "max":
        raise PlanError(f"{given}, with mode='max', which has no sparse gradient; give bags of mode 'sum' or 'mean'.")
    weight = own_parameters(part)["weight"]
    others = {
        name
        for name, other in module.named_modules()
        if other is not part and any(held is weight for held in own_parameters(other).values())
    }
    if others:
        raise PlanError(
            f"{given}, whose weight is tied to that of {min(others)!r}, which needs all of it; give tables that are"
            " used alone, or untie them."
        )


def _scattered(whole: Tensor, device: torch.device) -> Tensor:
    """Return this rank's rows of rank 0's table, which rank 0 sends in chunks to their owners."""
    rank, ranks = comm.rank(), comm.world_size()
    start, length = share(whole.shape[0], rank, ranks)
    if whole.is_meta:
        return whole.new_empty((length, *whole.shape[1:]))
    own = torch.empty((length, *whole.shape[1:]), dtype=whole.dtype, device=device)
    step = chunk_rows(whole)
    if rank:
        for first in range(0, length, step):
            comm.receive(own[first : first + step], 0)
        return own
    own.copy_(whole[start : start + length])
    for other in range(1, ranks):
        start, length = share(whole.shape[0], other, ranks)
        for first in range(start, start + length, step):
            comm.send(whole[first : min(first + step, start + length)].to(device).contiguous(), other)
    return own


class _Fetched(torch.autograd.Function):
    """Identity on fetched rows whose backward keeps the gradient with the table until it is sent."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, table: Table, ids: Tensor, values: Tensor) -> Tensor:
        ctx.table, ctx.ids = table, ids
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.table.keep_gradient(ctx.ids, gradient)
        return None, None, None, None


class _LookUp(Forward):
    """The forward of a row-sharded nn.Embedding."""

    def __init__(self, table: Table, lookups: Lookups) -> None:
        super().__init__(table.module)
        self._table, self._lookups = table, lookups
        self.handles += [
            table.module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                partial(_take_full_table, table)
            ),
            table.module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(_mark_rows, table)
            ),
        ]

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute `nn.Embedding.forward`: a collective.

        Raises:
            PlanError: On all ranks, when the ids of one of them are out of range, or not int64 or int32.
        """
        if self._table.aside is not None:
            result: Tensor = self.original(input, *args, **kwargs)
            return result
        if input.dtype not in _IDS:
            self._lookups.refuse(self._table, input.dtype)
        ids, places = torch.unique(input.long(), return_inverse=True)
        rows = self._lookups.look_up(self._table, ids)
        rows = _Fetched.apply(self._table.weight, self._table, ids, rows)  # type: ignore[no-untyped-call]
        if not len(ids):
            # torch's functions need at least one row.
            rows = F.pad(rows, (0, 0, 0, 1))
        return self._computed(rows, ids, places, *args, **kwargs)

    def _computed(self, rows: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        return F.embedding(places, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise PlanError(
            f"table {self._table.name!r} is row-sharded and cannot be copied; copy in"
            " `with trainer.strategy.full_parameters():` its state_dict, or after `trainer.strategy.make_whole()`."
        )


class _LookUpBags(_LookUp):
    """The forward of a row-sharded nn.EmbeddingBag."""

    def _computed(
        self,
        rows: Tensor,
        ids: Tensor,
        places: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        bag = self._table.module
        assert isinstance(bag, nn.EmbeddingBag)
        padding = None
        if bag.padding_idx is not None and len(found := torch.nonzero(ids == bag.padding_idx)):
            padding = int(found)
        return F.embedding_bag(
            places,
            rows,
            # int64 like `places`; torch itself refuses any other dtype.
            offsets.long() if offsets is not None and offsets.dtype in _IDS else offsets,
            mode=bag.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=bag.include_last_offset,
            padding_idx=padding,
        )


def _take_full_table(table: Table, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let `load_state_dict`, whose copy of the state dict is `state`, accept the full table."""
    name = f"{prefix}weight"
    # It may be this rank's rows already, if loading of the whole module has sharded full tensors.
    if table.aside is None and name in state and state[name].shape[0] == table.rows.rows:
        state[name] = divided_like(state[name], table.weight)


def _mark_rows(table: Table, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Mark the weight in a `state_dict` as rows of a table."""
    if table.aside is None:
        mark_rows(state[f"{prefix}weight"], table.rows)
