"""Ranks that run out of batches at different times.

Each step of a sharded module gathers parameters, and each training step reduces gradients, which takes all ranks. In
evaluation a rank that is out of batches gathers along without computing, so every batch counts once; so it does where
tables are looked up that lie on all ranks. In training an epoch ends on all ranks at the first batch that one of them
lacks.
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
from lightning_largescale.parallel.gather import gather_along, meet, sharded_state
from lightning_largescale.parallel.rounds import LOOK_UP

_NOTHING = object()


class UnevenSteps:
    """The steps of one evaluation of a module that is sharded, or has row-sharded tables: `start` before each of this
    rank's, `end` after the last.

    Args:
        module: divided, or whole where ranks are to meet before each step all the same.
        any_going: given whether this rank has a step to run, tells whether any rank has: a collective.
    """

    def __init__(self, module: nn.Module, any_going: Callable[[bool], bool]) -> None:
        self._module, self._any_going = module, any_going

    def start(self) -> None:
        """Tell the others that this rank is about to run a step."""
        self._any_going(True)

    def end(self) -> None:
        """Take part in the steps that other ranks still have."""
        lookups = row_sharded(self._module)
        while self._any_going(False):
            with joined_look_ups(self._module):
                gather_along(self._module, None if lookups is None else lookups.look_up_along)


@contextmanager
def joined_look_ups(module: nn.Module) -> Iterator[None]:
    """A step of `module`, which ends when no rank looks up rows any more; so does what comes before each gather."""
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
    """Refuse to evaluate where this rank or another has no batch: it would not log what the others wait for.

    A collective.

    Raises:
        PlanError: on all ranks, `exhausted` being true on one of them and not on all.
    """
    if any_rank(exhausted, device) and any_rank(not exhausted, device):
        raise PlanError(
            f"{'this rank' if exhausted else 'another rank'} has no batch to evaluate, so what the others log would"
            " wait for it; give every rank at least one."
        )


def equal_batches(loader: Any, device: torch.device) -> Any:
    """`loader`, ended on all ranks at the first batch that one of them lacks: a collective.

    Returns:
        `loader` itself where all ranks have the same number, else something that iterates, and has its attributes.
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
    """A loader that has as many batches as those of the other ranks.

    Args:
        loader: of this rank; its attributes are this one's too.
        length: how many all ranks have, None where one of them does not know: then they ask before each batch.
        device: of this rank.
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
            # Asked by copiers, before there is one.
            raise AttributeError(name)
        return getattr(vars(self)["_loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)


class _StatefulEqualBatches(EqualBatches):
    """The same of a loader that is saved with the loop: what is looked for by name on the class."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether `value` is true on any rank: a collective."""
    flag = torch.tensor(int(value), device=device)
    comm.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
