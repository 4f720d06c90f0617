"""Functions run in a fork: what they return, raise and do, and how the fork ends."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_sharer

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import run_connected

from lightning_largescale.apart import ApartError, StuckError, can_run_apart, others_threads, run_apart
from lightning_largescale.errors import PlanError

seen: list[str] = []


def noisy():
    seen.append("here")
    print("printed")
    os.write(2, b"written")
    torch.manual_seed(1)
    return torch.ones(1024, 1024), os.getpid()


def test_what_it_does_is_not_done_here(capfd):
    state = torch.get_rng_state()
    ones, pid = run_apart(noisy)
    assert ones.sum() == 1024**2
    assert pid != os.getpid()
    assert not seen
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def fail(error):
    raise error


def test_what_it_raises():
    with pytest.raises(PlanError, match=r"^found, accepted$"):
        run_apart(lambda: fail(PlanError("found, accepted")))
    with pytest.raises(ApartError, match=r"^KeyError: 'x'$"):
        run_apart(lambda: fail(KeyError("x")))
    with pytest.raises(ApartError, match=r"^.*pickle"):
        run_apart(lambda: lambda: None)


def test_how_it_ends():
    children = set(psutil.Process().children())
    with pytest.raises(ApartError, match=r"was killed by signal 9 \(SIGKILL\)"):
        run_apart(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ApartError, match="ended with exit status 1"):
        run_apart(lambda: os._exit(1))
    with pytest.raises(StuckError, match="waited for 1 s"):
        run_apart(signal.pause, idle=1)
    with pytest.raises(ApartError, match="said nothing for 1 s"):
        run_apart(work_forever, timeout=1)
    assert set(psutil.Process().children()) == children


def work_forever():
    while True:
        pass


def test_what_it_started_works_for_it_and_ends_with_it(tmp_path):
    code = "print(sum(number * number for number in range(3_000_000)))"
    assert run_apart(lambda: subprocess.run([sys.executable, "-c", code], check=True).returncode, idle=0.5) == 0

    def wait():
        process = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pid").write_text(str(process.pid))
        process.wait()

    with pytest.raises(StuckError):
        run_apart(wait, idle=0.5)
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid):
    """Whether a process ends; one that nobody waits for is a zombie then."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        deadline = time.monotonic() + 60
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread watches")
def test_it_ends_when_this_process_is_killed(tmp_path):
    def wait():
        (tmp_path / "part").write_text(str(os.getpid()))
        os.rename(tmp_path / "part", tmp_path / "pid")
        # No thread of Python's can run beside it.
        ctypes.PyDLL(None).pause()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parent = os.fork()
    if not parent:
        with contextlib.suppress(ApartError):
            run_apart(wait, idle=600)
        os._exit(0)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(int((tmp_path / "pid").read_text()))


class Group:
    """As a process group of gloo: its end waits for threads that a fork does not have."""

    def __init__(self):
        self.itself, self.pid = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.pid:
            signal.pause()


def collect():
    gc.collect()
    # Of what is made in the fork, too.
    gc.enable()
    return len([[[]] for _ in range(100_000)])


def test_it_collects_nothing_of_this_process():
    enabled = gc.isenabled()
    gc.disable()
    try:
        Group()
        assert run_apart(collect) == 100_000
        assert not gc.isenabled()
    finally:
        if enabled:
            gc.enable()
    assert run_apart(gc.isenabled) is False
    assert gc.isenabled() == enabled
    # Forks of later tests may collect it.
    gc.collect()


@contextlib.contextmanager
def thread_of_a_library(name):
    """Runs one that Python knows nothing of."""
    libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
    before = {*os.listdir("/proc/self/task")}
    libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
    (number,) = {*os.listdir("/proc/self/task")} - before
    with open(f"/proc/self/task/{number}/comm", "w") as file:
        file.write(name)
    try:
        yield
    finally:
        libc.pthread_cancel(thread)
        libc.pthread_join(thread, None)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
def test_threads_of_others():
    assert others_threads() == []
    assert can_run_apart() or torch.version.cuda is not None
    for name, found in (("polars-0", ["polars-0"]), ("pt_autograd_0", []), ("gloo_tcp_loop", []), ("ZMQbg/Reaper", [])):
        with thread_of_a_library(name):
            assert others_threads() == found
            assert not (found and can_run_apart())
    over = threading.Event()
    fills = threading.Thread(target=over.wait, name="fills")
    fills.start()
    try:
        assert others_threads() == ["fills"]
        assert not can_run_apart()
    finally:
        over.set()
        fills.join()


def test_threads_of_tools_are_none_of_others():
    from tqdm import tqdm

    with open(os.devnull, "w") as nowhere, tqdm(total=1, file=nowhere):
        assert any(type(thread).__name__ == "TMonitor" for thread in threading.enumerate())
        assert others_threads() == []
    # Which serves what processes send one another; it never ends.
    with os.fdopen(os.open(os.devnull, os.O_RDONLY)) as nowhere:
        resource_sharer.DupFd(nowhere.fileno())
        assert any("_serve" in thread.name for thread in threading.enumerate())
        assert others_threads() == []
        resource_sharer.stop()
    with ThreadPoolExecutor(1, "lightning_largescale store") as pool:
        pool.submit(os.getpid).result()
        assert others_threads() == []


def test_whether_it_can_is_tried():
    torch.ones(2, requires_grad=True).sum().backward()
    # A build without CUDA differentiates in a fork of a process that has differentiated.
    assert can_run_apart() or torch.version.cuda is not None


def collectives_apart():
    def alone():
        dist.barrier()
        dist.all_reduce(torch.ones(1))
        return dist.get_rank(), dist.get_world_size()

    answer = run_apart(alone) if dist.get_rank() == 1 else None
    total = torch.ones(1)
    dist.all_reduce(total)
    return answer, float(total)


def test_the_other_ranks_do_not_notice():
    assert run_connected(2, collectives_apart) == [(None, 2.0), ((1, 2), 2.0)]
