"""A batch is looked at before the run, and the run still sees every sample."""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from models import trainer
from ranks import quiet
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_largescale import apart, step_tracer
from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError

pytestmark = quiet


class Seen(LightningModule):
    """Notes every batch it is trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches: list[object] = []

    def training_step(self, batch, index):
        self.batches.append(batch)
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch
        return self.layer(first.float().reshape(-1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Once(IterableDataset):
    """A stream that can be read once."""

    def __init__(self, samples):
        self.stream = iter(range(samples))

    def __iter__(self):
        return self.stream


def fit(loader, strategy=None, **options):
    torch.manual_seed(0)
    module = Seen()
    run = trainer(strategy or LargeScaleAutoStrategy(), max_steps=-1, max_epochs=1, **options)
    run.fit(module, loader)
    return module.batches, run


def flat(batches):
    return [int(value) for batch in batches for value in batch.flatten()]


def test_stream_that_is_read_once():
    batches, _ = fit(DataLoader(Once(10), batch_size=2))
    assert flat(batches) == list(range(10))


def test_a_generator_of_batches():
    batches, run = fit(torch.full((2,), index) for index in range(5))
    assert flat(batches) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert run.strategy.report.workload.batch_samples == 2


def test_shuffled_batches_are_those_of_a_run_without_us():
    loader = DataLoader(range(32), batch_size=4, shuffle=True)
    ours, _ = fit(loader)
    theirs, _ = fit(loader, "auto")
    assert flat(ours) == flat(theirs)


class Opened(Dataset):
    """Opens its file at the first read, as a dataset of an HDF5 file does."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        os.lseek(self.file, index, os.SEEK_SET)
        return torch.tensor(os.read(self.file, 1)[0])


def test_workers_do_not_share_what_the_look_ahead_opened(tmp_path):
    (tmp_path / "bytes").write_bytes(bytes(range(64)))
    dataset = Opened(tmp_path / "bytes")
    batches, run = fit(DataLoader(dataset, batch_size=4, num_workers=2))
    assert dataset.file is None
    assert flat(batches) == list(range(64))
    assert run.strategy.report.workload.batch_samples == 4


def test_several_loaders():
    loaders = {"a": DataLoader(range(4), batch_size=2), "b": DataLoader(Once(4), batch_size=2)}
    batches, run = fit(loaders)
    assert [flat([batch["b"]]) for batch in batches] == [[0, 1], [2, 3]]
    assert run.strategy.report.workload.batch_bytes == 32
    batches, _ = fit(CombinedLoader({"a": DataLoader(Once(6), batch_size=2)}, "max_size"))
    assert flat(batch["a"] for batch in batches) == list(range(6))


def test_the_users_hook_is_asked_once_and_its_loader_kept():
    class Asked(Seen):
        asked = 0

        def train_dataloader(self):
            self.asked += 1
            return DataLoader(range(4), batch_size=2)

    module = Asked()
    run = trainer(LargeScaleAutoStrategy(), max_steps=-1, max_epochs=2)
    run.fit(module)
    assert module.asked == 1
    assert isinstance(run.train_dataloader, DataLoader)
    reloading = Asked()
    trainer(LargeScaleAutoStrategy(), max_steps=-1, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(reloading)
    assert reloading.asked == 2


def test_batch_hooks_are_applied_to_what_is_traced():
    class Doubled(Seen):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer.training
            return torch.cat([batch, batch])

    run = trainer(LargeScaleAutoStrategy(), max_steps=1)
    run.fit(Doubled(), DataLoader(range(4), batch_size=2))
    assert run.strategy.report.workload.batch_samples == 4


def test_a_loader_that_cannot_be_made_before_the_run():
    class Late(Seen):
        def on_fit_start(self):
            self.data = range(4)

        def train_dataloader(self):
            return DataLoader(self.data, batch_size=2)

    run = trainer(LargeScaleAutoStrategy(), max_steps=2)
    module = Late()
    run.fit(module)
    assert flat(module.batches) == [0, 1, 2, 3]
    assert "no batch could be read before the run (AttributeError" in run.strategy.report.workload.approximate[0]


def test_a_batch_given_by_the_user():
    run = trainer(LargeScaleAutoStrategy(sample_batch=torch.zeros(7)), max_steps=1)
    run.fit(Seen(), DataLoader(range(4), batch_size=2))
    assert run.strategy.report.workload.batch_samples == 7


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("loader", [[], DataLoader([])])
def test_an_empty_loader_trains_nothing(loader):
    batches, run = fit(loader)
    assert batches == []
    assert run.strategy.report.workload.approximate


def test_a_run_that_failed_leaves_its_loader_to_no_other():
    module, run = Seen(), trainer(LargeScaleAutoStrategy(memory_budget="1MiB"), max_steps=-1, max_epochs=1)
    with pytest.raises(PlanError):
        run.fit(module, DataLoader(torch.ones(4), batch_size=2))
    run.strategy._memory_budget = None
    run.fit(module, DataLoader(torch.full((4,), 2.0), batch_size=2))
    assert flat(module.batches) == [2, 2, 2, 2]


class Buckets:
    """A batch sampler that has no batch size."""

    def __iter__(self):
        return iter([[0, 1, 2], [3]])

    def __len__(self):
        return 2


def test_a_batch_sampler_of_the_users_own():
    batches, run = fit(DataLoader(range(4), batch_sampler=Buckets()))
    assert flat(batches) == [0, 1, 2, 3]
    assert run.strategy.report.workload.batch_samples == 3


class Served(Dataset):
    """Asks a thread for each sample, and counts; `start` is called before `fit`."""

    def __init__(self):
        self.served, self.kept = 0, {"last": [0]}

    def start(self):
        raise NotImplementedError

    def ask(self, index):
        raise NotImplementedError

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.served += 1
        self.kept["last"][0] = index
        return torch.tensor(self.ask(index))


class ByPool(Served):
    """A pool of threads that has worked before."""

    def start(self):
        self.pool = ThreadPoolExecutor(1)
        assert self.ask(1) == 1
        return self.pool.shutdown

    def ask(self, index):
        return self.pool.submit(lambda: index).result()


class ByLock(Served):
    """A lock that a thread holds most of the time."""

    def start(self):
        self.lock, over, held = threading.Lock(), threading.Event(), threading.Event()

        def hold():
            while not over.is_set():
                with self.lock:
                    held.set()
                    over.wait(0.01)
                over.wait(0.001)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        return lambda: (over.set(), thread.join())

    def ask(self, index):
        with self.lock:
            return index


class ByLibrary(Served):
    """What only a thread of this process can tell, which nobody sees that it has."""

    def start(self):
        self.pid = os.getpid()
        return lambda: None

    def ask(self, index):
        if os.getpid() != self.pid:
            threading.Event().wait()
        return index


@pytest.mark.parametrize("kind", [ByPool, ByLock, ByLibrary])
def test_a_dataset_that_needs_a_thread_is_looked_at_here_and_left_as_it_was(kind, monkeypatch):
    monkeypatch.setattr(step_tracer, "run_apart", partial(apart.run_apart, idle=0.5))
    dataset = kind()
    end = dataset.start()
    try:
        batches, run = fit(DataLoader(dataset, batch_size=2))
    finally:
        end()
    assert flat(batches) == list(range(8))
    assert run.strategy.report.workload.batch_samples == 2
    assert not run.strategy.report.workload.approximate
    # As often as in a run without us.
    assert (dataset.served, dataset.kept) == (8, {"last": [7]})


class Filled:
    """Batches that a thread puts into a queue, once."""

    def __init__(self):
        self.queue = queue.Queue(1)
        self.thread = threading.Thread(target=self.fill)
        self.thread.start()

    def fill(self):
        for index in range(4):
            self.queue.put(torch.full((2,), index))
        self.queue.put(None)

    def __iter__(self):
        return iter(self.queue.get, None)


def test_a_loader_that_a_thread_fills():
    loader = Filled()
    batches, run = fit(loader)
    loader.thread.join()
    assert flat(batches) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert run.strategy.report.workload.batch_samples == 2


class Noting(Seen):
    """Keeps books in its hooks and its step."""

    def __init__(self):
        super().__init__()
        self.moved, self.books = 0, {"steps": [], "meter": SimpleNamespace(total=0)}

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.moved += 1
        return batch

    def training_step(self, batch, index):
        self.books["steps"].append(index)
        self.books["meter"].total += 1
        return super().training_step(batch, index)


def beside_a_thread():
    """Books and batches of a run, on rank 0 beside a thread of another."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    if os.environ["RANK"] == "0":
        thread.start()
    module = Noting()
    run = trainer(LargeScaleAutoStrategy(), devices=2, max_steps=-1, max_epochs=1)
    try:
        run.fit(module, DataLoader(range(8), batch_size=2))
    finally:
        over.set()
    return module.moved, module.books, flat(module.batches), run.strategy.report.workload.approximate


def test_ranks_of_which_one_has_a_thread(two):
    books = {"steps": [0, 1, 2, 3], "meter": SimpleNamespace(total=4)}
    assert two.run(beside_a_thread) == [(4, books, list(range(8)), ())] * 2
