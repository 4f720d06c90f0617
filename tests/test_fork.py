"""Ranks as forks of this very process: what they return, and how they fail."""

import gc
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from lightning_largescale.errors import PlanError
from lightning_largescale.fork import ForkLauncher
from lightning_largescale.launch import watch_peers

# Python 3.12 and later warn of forks where threads exist; torch's idle ones are what one thread a fork is for.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Ranks(DDPStrategy):
    """Two ranks of Lightning's own strategy, connected without a Trainer."""

    def __init__(self):
        super().__init__(parallel_devices=[torch.device("cpu")] * 2, cluster_environment=LightningEnvironment())
        self._launcher = ForkLauncher(self, start_method="fork")

    def connect(self):
        self.setup_distributed()
        watch_peers(self)


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("MASTER_PORT", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return Ranks()


def test_what_rank_zero_returns_comes_back(ranks):
    def rank():
        ranks.connect()
        numbers = torch.tensor([float(ranks.global_rank + 1)])
        dist.all_reduce(numbers)
        return numbers.item(), ranks.global_rank

    assert ranks.launcher.launch(rank) == (3.0, 0)


def test_forks_compute_where_the_parent_had_two_threads(ranks):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    numbers = torch.ones(2_000_000)  # enough for torch to divide among threads
    expected = (numbers + 1).exp().sum().item()
    try:
        # Hangs for ever with two threads in the forks.
        total, count = ranks.launcher.launch(lambda: ((numbers + 1).exp().sum().item(), torch.get_num_threads()))
    finally:
        torch.set_num_threads(threads)
    assert total == pytest.approx(expected)
    assert count == 1


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_to_fail_is_the_one_that_is_raised(ranks, first):
    def rank():
        ranks.connect()
        if ranks.global_rank == first:
            raise ValueError("boom")
        dist.barrier()

    with pytest.raises(ProcessRaisedException, match="ValueError: boom") as raised:
        ranks.launcher.launch(rank)
    assert raised.value.error_index == first
    assert "Connection" not in str(raised.value)
    assert not any(process.is_alive() for process in ranks.launcher.procs)


@pytest.mark.slow
def test_a_rank_that_fails_before_it_is_connected(ranks):
    def rank():
        if os.environ["LOCAL_RANK"] == "0":
            raise ValueError("boom")
        ranks.connect()

    with pytest.raises(ProcessRaisedException, match="ValueError: boom"):
        ranks.launcher.launch(rank)


def test_a_killed_rank_is_told_with_the_usual_cause(ranks):
    def rank():
        ranks.connect()
        if ranks.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(ProcessExitedException, match=r"Rank 1 of this node was killed by signal 9 .* memory"):
        ranks.launcher.launch(rank)


def test_an_interrupt_ends_the_ranks(ranks):
    def rank():
        ranks.connect()
        dist.barrier()
        if ranks.global_rank == 0:
            os.kill(os.getppid(), signal.SIGINT)
        while True:
            pass

    with pytest.raises(KeyboardInterrupt):
        ranks.launcher.launch(rank)
    assert not any(process.is_alive() for process in ranks.launcher.procs)


def test_exit_without_an_error(ranks):
    with pytest.raises(ProcessExitedException, match="ended with exit status 3"):
        ranks.launcher.launch(lambda: sys.exit(3) if os.environ["LOCAL_RANK"] == "1" else None)


def test_forks_cannot_use_cuda_that_is_initialised(ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(PlanError, match=r"start_method='fork' cannot give the ranks CUDA.* start_method='popen'"):
        ranks.launcher.launch(lambda: None)


class Group:
    """As a process group of gloo: its end waits for threads that a fork does not have."""

    def __init__(self):
        self.itself, self.pid = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.pid:
            os._exit(7)


def test_forks_leave_garbage_to_the_parent_and_collect_their_own(ranks):
    gc.disable()
    try:
        Group()
        assert ranks.launcher.launch(lambda: (gc.collect() >= 0, gc.isenabled())) == (True, False)
    finally:
        gc.enable()
    assert ranks.launcher.launch(lambda: (gc.collect() >= 0, gc.isenabled())) == (True, True)
    # Forks of later tests may collect it.
    gc.collect()
