"""Support for Lightning's finders: all ranks try the same batch sizes, an out-of-memory error on one rank ends the
trial on all, and a trial that ends halfway leaves no state behind.

Lightning limits the finder to a single process: each rank would choose its own checkpoint name, end its search at the
length of its own data, and wait for ever for a rank that ran out of memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr

from lightning_largescale import comm, compat
from lightning_largescale.agree import run_together

# The attributes in which Lightning's finders keep their results.
_RESULTS = ("optimal_batch_size", "optimal_lr")


class SearchingStrategy(Protocol):
    """The interface of the strategy that a search uses.

    Attributes:
        searching: whether a search is under way.
    """

    searching: bool

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""

    @property
    def has_peers(self) -> bool:
        """Return whether there are other ranks."""

    def forget_step(self) -> None:
        """Restore the state after a step that ended halfway on all ranks."""

    def on_search_end(self) -> None:
        """Called when a search is over."""


@contextlib.contextmanager
def finders_search_together(strategy: SearchingStrategy, trainer: Trainer) -> Iterator[None]:
    """Context in which each BatchSizeFinder of `trainer`, the Tuner's included, searches alike on all ranks."""
    finders = _finders(trainer, BatchSizeFinder)
    for finder in finders:
        # Replaced on the object, not on the class: subclasses call it from their own hooks.
        finder.scale_batch_size = partial(_search, finder.scale_batch_size, strategy)
    try:
        yield
    finally:
        for finder in finders:
            del finder.scale_batch_size


def found(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the result of each finder of `trainer`, the module attribute that holds the value, and the value."""
    return [
        {
            "result": {name: vars(finder)[name] for name in _RESULTS if name in vars(finder)},
            "attribute": (name := compat.searched_attribute(finder, trainer.lightning_module)),
            "value": name and lightning_getattr(trainer.lightning_module, name),
        }
        for finder in _finders(trainer, BatchSizeFinder, LearningRateFinder)
    ]


def give_found(trainer: Trainer, values: list[dict[str, Any]]) -> None:
    """Set the results that `found` returned in another process on the finders of `trainer` and on its module."""
    for finder, value in zip(_finders(trainer, BatchSizeFinder, LearningRateFinder), values, strict=True):
        vars(finder).update(value["result"])
        if value["attribute"] is not None:
            lightning_setattr(trainer.lightning_module, value["attribute"], value["value"])


def _finders(trainer: Trainer, *kinds: type[Callback]) -> list[Any]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight
    return [callback for callback in callbacks if isinstance(callback, kinds)]


def _search(
    search: Callable[[Trainer, LightningModule], None],
    strategy: SearchingStrategy,
    trainer: Trainer,
    module: LightningModule,
) -> None:
    """Run `search` so that trials, and the setup of their loaders, end alike on all ranks."""
    running = False

    def together(function: Callable[[], Any]) -> Any:
        nonlocal running
        if running:
            return function()
        running = True
        try:
            return run_together(function, device=strategy.root_device, forget=_returns_to(strategy, trainer, module))
        finally:
            running = False

    def set_up(loop: Any, own: Callable[[], None]) -> None:
        together(own)
        if strategy.has_peers:
            compat.set_dataset_length(loop, partial(_shortest, strategy.root_device))

    with contextlib.ExitStack() as undo:
        for loop in (trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            for name, replaced in (
                ("run", partial(together, loop.run)),
                ("setup_data", partial(set_up, loop, loop.setup_data)),
            ):
                setattr(loop, name, replaced)
                undo.callback(delattr, loop, name)
        strategy.searching = True
        undo.callback(setattr, strategy, "searching", False)
        search(trainer, module)
        strategy.on_search_end()


def _returns_to(strategy: SearchingStrategy, trainer: Trainer, module: LightningModule) -> Callable[[], None]:
    """Return a function that restores module and trainer, except weights and loops, which the finder restores."""
    stage, modes = trainer.state.stage, {part: part.training for part in module.modules()}

    def forget() -> None:
        strategy.forget_step()
        # If validation was under way, the next trial would only validate.
        trainer.state.stage = stage
        for part, training in modes.items():
            part.training = training

    return forget


def _shortest(device: torch.device, own: Callable[[], int]) -> int:
    """Return the minimum of `own` over all ranks: a collective.

    Raises:
        NotImplementedError: `own` raises it on every rank, since no rank's data has a length.
    """
    try:
        length: float = own()
    except NotImplementedError:
        length = math.inf
    shortest = torch.tensor(length, dtype=torch.float64, device=device)
    comm.all_reduce(shortest, dist.ReduceOp.MIN)
    if math.isinf(shortest):
        raise NotImplementedError("the data of no rank has a length")
    return int(shortest)
