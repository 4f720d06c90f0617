"""Functions run in a fork: what they return, raise and do, and how the fork ends."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import run_connected

from lightning_largescale.apart import ApartError, can_run_apart, run_apart
from lightning_largescale.plan import PlanError

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
    with pytest.raises(ApartError, match="said nothing for 1 s"):
        run_apart(signal.pause, timeout=1)
    assert set(psutil.Process().children()) == children


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
