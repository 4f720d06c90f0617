"""Lightning's finders: ranks try the same batch sizes, what one has no memory for none has, and a trial that ends
halfway leaves nothing behind.

Lightning keeps the finder to a single process: each rank would name a checkpoint of its own, end its search at its own
length of data, and wait for ever for one that ran out of memory.
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

# Where Lightning's finders keep what they found.
_RESULTS = ("optimal_batch_size", "optimal_lr")


class SearchingStrategy(Protocol):
    """What a search asks of the strategy.

    Attributes:
        searching: whether a search is under way.
    """

    searching: bool

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""

    @property
    def has_peers(self) -> bool:
        """Whether there are other ranks."""

    def forget_step(self) -> None:
        """Make good what a step, ended halfway on all ranks, left behind."""

    def on_search_end(self) -> None:
        """Called when a search is over."""


@contextlib.contextmanager
def finders_search_together(strategy: SearchingStrategy, trainer: Trainer) -> Iterator[None]:
    """Within, a BatchSizeFinder of `trainer`, the Tuner's too, searches on all ranks alike."""
    finders = _finders(trainer, BatchSizeFinder)
    for finder in finders:
        # The object's, not the class's: subclasses call it from hooks of their own.
        finder.scale_batch_size = partial(_search, finder.scale_batch_size, strategy)
    try:
        yield
    finally:
        for finder in finders:
            del finder.scale_batch_size


def found(trainer: Trainer) -> list[dict[str, Any]]:
    """What each finder of `trainer` has found: its result, and the attribute of the module that holds the value."""
    return [
        {
            "result": {name: vars(finder)[name] for name in _RESULTS if name in vars(finder)},
            "attribute": (name := compat.searched_attribute(finder, trainer.lightning_module)),
            "value": name and lightning_getattr(trainer.lightning_module, name),
        }
        for finder in _finders(trainer, BatchSizeFinder, LearningRateFinder)
    ]


def give_found(trainer: Trainer, values: list[dict[str, Any]]) -> None:
    """Let the finders of `trainer`, and its module, have what `found` returned in another process."""
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
    """Run `search` with trials, and the making of loaders for them, that end on all ranks alike."""
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
    """What takes module and trainer back to where they are now, weights and loops apart: the finder restores those."""
    stage, modes = trainer.state.stage, {part: part.training for part in module.modules()}

    def forget() -> None:
        strategy.forget_step()
        # Where validation was under way, the next trial would be one of validation alone.
        trainer.state.stage = stage
        for part, training in modes.items():
            part.training = training

    return forget


def _shortest(device: torch.device, own: Callable[[], int]) -> int:
    """The least `own` of any rank: a collective.

    Raises:
        NotImplementedError: no rank's data has a length, as `own` raises it.
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
