"""A sample batch for tracing, read from the trainer's own loader without taking a sample from the run.

A map-style dataset is read at its first indices, without the sampler. Any other iterable may be readable only once: it
is opened now, and the run receives it with the batch put back in front.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_largescale import compat
from lightning_largescale.workload.batch import digest_of
from lightning_largescale.workload.keep import keep

# The mode in which Lightning combines several loaders that are not a CombinedLoader yet, by whether it trains.
_MODES: dict[bool, Any] = {True: "max_size_cycle", False: "sequential"}


def sample_batch(trainer: Trainer, *, peek: bool = True, put_back: bool = False) -> Any:
    """Return one batch of the loop that is about to run, on the CPU as the loader yields it; the run sees every sample.

    Calls the user's `*_dataloader` hook once: the run receives the same loader. Every rank calls this, since such a
    hook may communicate, and one rank with `peek`. The random state is restored.

    Args:
        trainer: The trainer that owns the loop.
        peek: Whether to read a batch.
        put_back: Whether to restore the state of a map-style dataset after it was read in this process.

    Returns:
        The batch; None without `peek`, or if there is no loader or it is empty.

    Raises:
        Exception: what the user's loader or dataset raises.
    """
    training = _active_loop(trainer)[0] is trainer.fit_loop
    with _loaders(trainer) as combined:
        if combined is None:
            return None
        peeked = [_peek(loader, put_back) if peek else (None, loader) for loader in combined.flattened]
        combined.flattened = [loader for _, loader in peeked]
    batches = [batch for batch, _ in peeked]
    if any(batch is None for batch in batches) or not batches:
        return None
    return compat.combine_batches(combined, batches) if training else batches[0]


def samples_of_rank(trainer: Trainer) -> tuple[object, ...]:
    """Return identifiers of the samples of this rank, equal on ranks that receive the same samples.

    Calls the user's hook as `sample_batch` does; every rank calls this. For a sampler that shards a dataset, such as
    torch's DistributedSampler, the identifier is its share; for an iterable, the digest of its first batch, which the
    run still sees, or the rank where that cannot be compared; for any other loader None, since Lightning shards it.

    Args:
        trainer: The trainer whose loop is about to run.

    Returns:
        One identifier per loader.

    Raises:
        Exception: what the user's loader or dataset raises.
    """
    found: list[object] = []
    with _loaders(trainer) as combined:
        if combined is None:
            return ()
        for index, loader in enumerate(combined.flattened):
            if _is_map_style(loader):
                found.append(_share(loader))
            elif getattr(trainer, "overfit_batches", 0) or int(os.environ.get("PL_SEED_WORKERS", 0)):
                # Lightning replaces or seeds the loader itself later, which an open one would not follow.
                found.append(trainer.global_rank)
            else:
                batch, opened = _peek(loader, put_back=False)
                combined.flattened = [*combined.flattened[:index], opened, *combined.flattened[index + 1 :]]
                found.append(digest_of(batch) or trainer.global_rank)
    return tuple(found)


def _share(loader: Any) -> tuple[int, int] | None:
    """Return the rank and the number of replicas of the sampler of `loader`; None if it does not shard the dataset."""
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        among, rank = getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)
        if isinstance(among, int) and isinstance(rank, int):
            return rank, among
    return None


@contextlib.contextmanager
def _loaders(trainer: Trainer) -> Iterator[CombinedLoader | None]:
    """Yield the loaders of the loop that is about to run, then hand them to it as the block left them; yield None if it
    has no loaders to ask for.
    """
    loop, limit = _active_loop(trainer)
    source = compat.loader_source(loop)
    if source is None or limit == 0:
        yield None
        return
    loaders = compat.request_loaders(source)
    training = loop is trainer.fit_loop
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, _MODES[training])
    try:
        yield combined
    finally:
        # Also where a loader has failed: others are open.
        compat.keep_loaders(loop, source, combined if isinstance(loaders, CombinedLoader) else combined.iterables)


def ask_for_loaders_again(trainer: Trainer) -> None:
    """Let the loop that is about to run call the `*_dataloader` hook again; `sample_batch` has called it too early."""
    loop, _ = _active_loop(trainer)
    compat.drop_kept_loaders(loop)


class OpenedLoader:
    """An iterable that was opened early: its first iteration begins with the batches already taken.

    All other attributes are those of the loader.
    """

    def __init__(self, loader: Any, iterator: Iterator[Any], taken: list[Any]) -> None:
        """Create the iterable.

        Args:
            loader: The loader, which is iterated anew from the second iteration on.
            iterator: The iterator of the loader that was opened.
            taken: The batches that were taken from it.
        """
        self._loader = loader
        self._opened: Iterator[Any] | None = itertools.chain(taken, iterator)

    def __iter__(self) -> Iterator[Any]:
        # A generator, since Lightning calls `iter` once only to see whether it can.
        opened, self._opened = self._opened, None
        yield from self._loader if opened is None else opened

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


class _SizedOpenedLoader(OpenedLoader):
    def __len__(self) -> int:
        return len(self._loader)


def _active_loop(trainer: Trainer) -> tuple[Any, int | float]:
    """Return the loop that is about to run and its limit of batches: a count, or a fraction as a float."""
    loops: dict[Any, tuple[Any, int | float]] = {
        TrainerFn.VALIDATING: (trainer.validate_loop, trainer.limit_val_batches),
        TrainerFn.TESTING: (trainer.test_loop, trainer.limit_test_batches),
        TrainerFn.PREDICTING: (trainer.predict_loop, trainer.limit_predict_batches),
    }
    return loops.get(trainer.state.fn, (trainer.fit_loop, trainer.limit_train_batches))


def _peek(loader: Any, put_back: bool) -> tuple[Any, Any]:
    """Return one batch of `loader`, None if it has none to give, and the iterable that replaces `loader` in the run."""
    if _is_map_style(loader):
        with random_state_kept(), _dataset_kept(loader) if put_back else contextlib.nullcontext():
            return _first_batch(loader), loader
    if hasattr(loader, "load_state_dict"):
        # Its position in the data may be restored later, and an iterator that is already open would ignore that.
        return None, loader
    iterator = iter(loader)
    taken = list(itertools.islice(iterator, 1))
    kind = _SizedOpenedLoader if hasattr(loader, "__len__") and _has_length(loader) else OpenedLoader
    opened = kind(loader, iterator, taken)
    return taken[0] if taken else None, opened


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _first_batch(loader: DataLoader[Any]) -> Any:
    dataset: Any = loader.dataset
    if len(dataset) == 0:
        return None
    if loader.batch_sampler is None:
        return _read(loader, batch_size=None, sampler=[0])
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is not None:
        indices = list(range(min(size, len(dataset))))
    elif iter(loader.batch_sampler) is loader.batch_sampler:
        return None
    else:
        indices = list(next(iter(loader.batch_sampler), ()))
    return _read(loader, batch_sampler=[indices])


def _read(loader: DataLoader[Any], **which: Any) -> Any:
    """Return the batch that `which` selects from the loader's dataset, read where the run will read it.

    If the loader has workers, a worker reads it: a dataset that opens its file at the first read would otherwise hold
    it open here, and all workers of the run would share its file position.

    Args:
        loader: The loader.
        which: DataLoader arguments that select the samples.
    """
    workers: dict[str, Any] = {}
    if loader.num_workers > 0:
        workers = {
            "num_workers": 1,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    return next(iter(DataLoader(loader.dataset, collate_fn=loader.collate_fn, **which, **workers)))


@contextlib.contextmanager
def _dataset_kept(loader: DataLoader[Any]) -> Iterator[None]:
    """Run the block, then restore the state of the dataset, the collate function and the batch sampler."""
    collate: Any = loader.collate_fn
    kept = keep([], [loader.dataset, getattr(collate, "__self__", collate), loader.batch_sampler], data=True)
    try:
        yield
    finally:
        for put_back in kept:
            put_back()


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Run the block, then restore the random state of Python, numpy and torch (CPU)."""
    put_back = random_state_now()
    try:
        yield
    finally:
        put_back()


def random_state_now() -> Callable[[], None]:
    """Return a function that restores the current random state of Python, numpy and torch (CPU)."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)

    return put_back
