"""Handle ranks that run out of batches at different times.

Each step of a sharded module gathers parameters, and each training step reduces gradients; both need all ranks. In
evaluation a rank without batches takes part in the all-gathers, and in the look-ups of row-sharded tables, without
computing, so every batch counts once. In training an epoch ends on all ranks at the first batch that one of them lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_largescale import comm
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.embedding import row_sharded
from lightning_largescale.parallel.rounds import LOOK_UP
from lightning_largescale.parallel.sharded import meet, sharded_state
from lightning_largescale.parallel.sharded_step import gather_along

_NOTHING = object()


class UnevenSteps:
    """The steps of one evaluation of a sharded module, or of one with row-sharded tables.

    Call `start` before each step of this rank, and `end` after its last.

    Args:
        module: the module; it may be unsharded if ranks are to meet before each step anyway.
        any_going: receives whether this rank has a step to run, and returns whether any rank has; a collective.
    """

    def __init__(self, module: nn.Module, any_going: Callable[[bool], bool]) -> None:
        self._module, self._any_going = module, any_going

    def start(self) -> None:
        """Announce that this rank is about to run a step."""
        self._any_going(True)

    def end(self) -> None:
        """Take part in the steps that other ranks still have."""
        lookups = row_sharded(self._module)
        while self._any_going(False):
            with joined_look_ups(self._module):
                gather_along(self._module, None if lookups is None else lookups.look_up_along)


@contextmanager
def joined_look_ups(module: nn.Module) -> Iterator[None]:
    """Context of a step of `module` that joins other ranks' look-ups before each gather and at the end of the step."""
    lookups, sharded = row_sharded(module), sharded_state(module)
    if lookups is None:
        yield
        return
    lookups.start()
    if sharded is not None:
        sharded.before_gather = lookups.meet
        lookups.before_late = partial(meet, module, point=LOOK_UP)
    try:
        yield
        lookups.join()
    finally:
        lookups.stepping = False
        if sharded is not None:
            sharded.before_gather = None


def check_not_empty(exhausted: bool, device: torch.device) -> None:
    """Refuse to evaluate if only some ranks have a batch: the logging of the others would wait for the rest.

    A collective.

    Raises:
        PlanError: `exhausted` is true on some ranks but not on all; raised on all ranks.
    """
    if any_rank(exhausted, device) and any_rank(not exhausted, device):
        raise PlanError(
            f"{'this rank' if exhausted else 'another rank'} has no batch to evaluate, so what the others log would"
            " wait for it; give every rank at least one."
        )


def equal_batches(loader: Any, device: torch.device) -> Any:
    """Make `loader` end on all ranks at the first batch that one of them lacks; a collective.

    Returns:
        `loader` itself if all ranks have the same number of batches, else a wrapper with its attributes.
    """
    own = sized_len(loader)
    lengths = torch.empty(comm.world_size(), dtype=torch.int64, device=device)
    own_length = torch.tensor([-1 if own is None else own], device=device)
    comm.all_gather([*lengths.unsqueeze(1)], own_length)
    known = lengths.tolist()
    if min(known) == max(known) >= 0:
        return loader
    if min(known) > 0:
        rank_zero_warn(
            f"The ranks have {' and '.join(map(str, sorted(set(known))))} batches to train on, so each epoch ends after"
            f" {min(known)}; give all ranks the same number to train on all."
        )
    kind = (
        _StatefulEqualBatches if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") else EqualBatches
    )
    return kind(loader, None if min(known) < 0 else min(known), device)


class EqualBatches:
    """A loader that yields the same number of batches on all ranks.

    Args:
        loader: this rank's loader; its attributes are available on the wrapper.
        length: the number of batches that all ranks have; None if one of them does not know its number, in which case
            the ranks communicate before each batch.
        device: this rank's device.
    """

    def __init__(self, loader: Any, length: int | None, device: torch.device) -> None:
        vars(self).update(_loader=loader, _length=length, _device=device)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the number of batches is not known on all ranks")
        return int(self._length)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        if self._length is not None:
            for number in range(self._length):
                batch = next(batches, _NOTHING)
                if batch is _NOTHING:
                    raise RuntimeError(
                        f"{type(self._loader).__name__} promised {len(self._loader)} batches and has {number};"
                        " its `__len__` must give what it iterates."
                    )
                yield batch
            return
        while True:
            batch = next(batches, _NOTHING)
            if any_rank(batch is _NOTHING, self._device):
                break
            yield batch
        if any_rank(batch is not _NOTHING, self._device):
            rank_zero_warn(
                "A rank has no more batches to train on and another one has, so the epoch ends here on all;"
                " give all ranks the same number to train on all."
            )

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            # Copying asks for attributes before `_loader` is set.
            raise AttributeError(name)
        return getattr(vars(self)["_loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)


class _StatefulEqualBatches(EqualBatches):
    """An `EqualBatches` whose loader's state is saved with the loop, which looks for these methods on the class."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)


def any_rank(value: bool, device: torch.device) -> bool:
    """Return whether `value` is true on any rank; a collective."""
    flag = torch.tensor(int(value), device=device)
    comm.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
