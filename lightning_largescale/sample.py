"""One batch to trace with, taken from the trainer's own loader without stealing a sample from the run.

A map-style dataset is read at its first indices, past the sampler. Any other iterable, which may be readable only once,
is opened now and handed to the run with the batch put back in front.
"""

from __future__ import annotations

import contextlib
import itertools
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

# How Lightning combines several loaders that are not a CombinedLoader yet: in training, and elsewhere.
_MODES: dict[bool, Any] = {True: "max_size_cycle", False: "sequential"}


def sample_batch(trainer: Trainer, *, peek: bool = True, put_back: bool = False) -> Any:
    """One batch of the loop that is about to run, on the CPU as the loader gives it; the run still sees every sample.

    Asks the user's `*_dataloader` hook for its loader, once: the run is given the same object. Every rank calls this,
    since such a hook may communicate, and one of them with `peek`; the random state is as before.

    Args:
        trainer: whose loop.
        peek: whether to read one.
        put_back: what a map-style dataset holds is put back after it was read in this process.

    Returns:
        The batch; None without `peek`, or where there is no loader or it is empty.

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
    """What tells the samples of this rank from those of others: equal on ranks that are given the same.

    Asks as `sample_batch` does, and every rank calls this. Of a sampler that divides a dataset it is the share, as of
    torch's DistributedSampler; of an iterable the digest of its first batch, which the run still sees; of all else
    nothing, since Lightning divides it.

    Args:
        trainer: whose loop is about to run.

    Returns:
        One for each loader.

    Raises:
        Exception: what the user's loader or dataset raises.
    """
    found: list[object] = []
    with _loaders(trainer) as combined:
        if combined is None:
            return ()
        kept = []
        for loader in combined.flattened:
            batch, opened = (None, loader) if _is_map_style(loader) else _peek(loader, put_back=False)
            found.append(_share(loader) if batch is None else digest_of(batch))
            kept.append(opened)
        combined.flattened = kept
    return tuple(found)


def _share(loader: Any) -> tuple[int, int] | None:
    """Which of how many shares of a dataset the sampler of `loader` draws from."""
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        among, rank = getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)
        if isinstance(among, int) and isinstance(rank, int):
            return rank, among
    return None


@contextlib.contextmanager
def _loaders(trainer: Trainer) -> Iterator[CombinedLoader | None]:
    """The loaders of the loop that is about to run, which it is given as they are afterwards; None: it has none to ask
    for.
    """
    loop, limit = _active_loop(trainer)
    source = compat.loader_source(loop)
    if source is None or limit == 0:
        yield None
        return
    loaders = compat.request_loaders(source)
    training = loop is trainer.fit_loop
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, _MODES[training])
    yield combined
    compat.keep_loaders(loop, source, combined if isinstance(loaders, CombinedLoader) else combined.iterables)


def ask_for_loaders_again(trainer: Trainer) -> None:
    """Let the loop that is about to run ask for its loader anew, which `sample_batch` has asked for too early."""
    loop, _ = _active_loop(trainer)
    compat.drop_kept_loaders(loop)


class OpenedLoader:
    """An iterable that was opened early: the first time it is iterated, the batches already taken come first.

    Everything else is asked of the loader itself.
    """

    def __init__(self, loader: Any, iterator: Iterator[Any], taken: list[Any]) -> None:
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
    """The loop that is about to run, and how many batches of it: a count, or a share as a float."""
    loops: dict[Any, tuple[Any, int | float]] = {
        TrainerFn.VALIDATING: (trainer.validate_loop, trainer.limit_val_batches),
        TrainerFn.TESTING: (trainer.test_loop, trainer.limit_test_batches),
        TrainerFn.PREDICTING: (trainer.predict_loop, trainer.limit_predict_batches),
    }
    return loops.get(trainer.state.fn, (trainer.fit_loop, trainer.limit_train_batches))


def _peek(loader: Any, put_back: bool) -> tuple[Any, Any]:
    """One batch of `loader`, and what the run is to iterate in its place."""
    if _is_map_style(loader):
        with random_state_kept(), _dataset_kept(loader) if put_back else contextlib.nullcontext():
            return _first_batch(loader), loader
    if hasattr(loader, "load_state_dict"):
        # Its place in the data may be restored after this, which an iterator that is open would not follow.
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
    """What `which` picks of the loader's dataset, read where the run will read it.

    In a worker where there are workers: a dataset that opens its file at the first read would otherwise hold it open
    here, and all workers of the run would share the one position in it.
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
    """Within, the dataset and what puts its samples together may be used; after, they hold what they held."""
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
    """Within, random numbers may be drawn from Python, numpy and torch (CPU); after, it is as if none had been."""
    put_back = random_state_now()
    try:
        yield
    finally:
        put_back()


def random_state_now() -> Callable[[], None]:
    """What makes the generators of Python, numpy and torch (CPU) draw again what they draw from now on."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)

    return put_back
