"""Check whether an optimizer can step on a row-sharded table, by a trial on a small table.

It must accept sparse gradients, treat rows independently, and keep state of the table's shape or scalars.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_largescale.errors import PlanError
from lightning_largescale.optimizing import UntriedError, clone_of, in_words
from lightning_largescale.parallel.lookups import Lookups
from lightning_largescale.parallel.rows import sparse_rows

# A small table, its rows that get a gradient, and the row at which it is split in two.
_ROWS, _COLUMNS, _TOUCHED, _CUT = 8, 4, (1, 2, 6), 4
_STEPS = 2
_LEARNING_RATE = 1e-2


def check_takes_rows(
    optimizer: Optimizer, lookups: Lookups | None, initial: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Make sure that `optimizer` can step on the row-sharded tables among its parameters; it is not changed.

    Args:
        optimizer: an optimizer of any parameters.
        lookups: the lookups of the module's row-sharded tables; None if it has none.
        initial: the state that parameters had before the first step.

    Raises:
        PlanError: it cannot; the message names optimizers that can.
    """
    names = {} if lookups is None else {id(table.weight): table.name for table in lookups.tables}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names or not parameter.requires_grad:
                continue
            try:
                why = _refusal(optimizer, group, parameter, initial.get(parameter, {}))
                kind = PlanError
            except Exception as error:
                why, kind = f"it takes no sparse gradient ({in_words(error)})", UntriedError
            if why is not None:
                raise kind(
                    f"{type(optimizer).__name__} cannot train the row-sharded table {names[id(parameter)]!r}: {why};"
                    " give tables to torch.optim.SGD, Adagrad or SparseAdam, under manual optimization an optimizer"
                    " of their own, or leave them out of row_sharded_embeddings."
                )


def _refusal(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, initial: Mapping[str, Any]
) -> str | None:
    parts = (range(_ROWS), range(_CUT), range(_CUT, _ROWS))
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (whole, state), *halves = (_stepped(optimizer, group, parameter, initial, part) for part in parts)
    if not torch.allclose(whole, torch.cat([half for half, _ in halves])):
        return "its step on a table is not that on its rows"
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != whole.shape:
            return f"it keeps {key!r} of shape {tuple(value.shape)} for a table of shape {tuple(whole.shape)}"
    return None


def _stepped(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, initial: Mapping[str, Any], rows: range
) -> tuple[Tensor, dict[str, Any]]:
    """Let a copy of `optimizer` step on `rows` of a small table; return these rows and their state."""
    noise = torch.rand((_STEPS, _ROWS, _COLUMNS), generator=torch.Generator().manual_seed(0)) + 0.5
    noise = noise.to(parameter.device, parameter.dtype)
    table = nn.Parameter(noise[0, rows.start : rows.stop].clone())
    options = {**group, "params": [table]}
    if options.get("lr") is not None:
        options["lr"] = _LEARNING_RATE
    clone = clone_of(optimizer, [options])
    if initial:
        clone.state[table] = {
            key: torch.zeros_like(table, requires_grad=False)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value.clone()
            if isinstance(value, Tensor)
            else value
            for key, value in initial.items()
        }
    touched = torch.tensor([row for row in _TOUCHED if row in rows], device=parameter.device)
    for step in range(_STEPS):
        table.grad = sparse_rows(touched - rows.start, noise[step, touched], table.shape)
        clone.step()
    return table.detach(), clone.state[table]
