"""Ranks stop together, wherever one of them stops."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import Language, trainer
from ranks import quiet
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_largescale.agree import run_together
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


def connect():
    trainer(LargeScaleStrategy(Plan(dp_replicate=2)), devices=2, max_steps=1).fit(Language())


def steps(kind, stop, count):
    """A function of `count` collectives that on rank 1 calls `stop` before the second."""
    calls = []
    wrapper = DistributedDataParallel(torch.nn.Linear(2, 2)) if kind == "backward" else None
    mesh = init_device_mesh("cpu", (2,)) if kind == "DTensor" else None

    def function():
        for call in range(count):
            if dist.get_rank() == 1 and call == 1:
                stop()
            if wrapper is not None:
                wrapper(torch.ones(1, 2)).sum().backward()
            elif mesh is not None:
                distribute_tensor(torch.ones(2), mesh, [Shard(0)]).full_tensor()
            else:
                dist.all_reduce(torch.ones(1))
            calls.append(call)
        return "result"

    return function, calls


def out_of_memory():
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def failed():
    raise ValueError("its own")


def nothing():
    """Does not stop."""


STOPS = {"out of memory": out_of_memory, "failed": failed, "nothing": nothing}


def together(kind, stop, count=3):
    connect()
    if isinstance(count, tuple):
        count = count[dist.get_rank()]
    function, calls = steps(kind, STOPS[stop], count)
    forgotten = []
    try:
        end = run_together(function, device=torch.device("cpu"), forget=lambda: forgotten.append(1))
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    # All are in step again.
    there = torch.ones(1)
    dist.all_reduce(there)
    return end, len(calls), len(forgotten), float(there)


@pytest.mark.parametrize("kind", ["plain", "backward", "DTensor"])
def test_out_of_memory_on_one_is_out_of_memory_on_all(two, kind):
    said = "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert two.run(together, kind, "out of memory") == [(f"{said}: on another rank", 1, 1, 2.0), (said, 1, 1, 2.0)]


def test_another_failure_is_told_as_one(two):
    told, own = two.run(together, "plain", "failed")
    assert told == ("DistError: another rank failed in the same step", 1, 1, 2.0)
    assert own == ("ValueError: its own", 1, 1, 2.0)


def test_it_ends_where_the_first_rank_ends(two):
    assert two.run(together, "plain", "nothing") == [("result", 3, 0, 2.0)] * 2
    assert two.run(together, "plain", "nothing", (5, 2)) == [(None, 2, 1, 2.0), ("result", 2, 0, 2.0)]


def test_one_process_makes_good_what_it_leaves():
    forgotten = []

    def run(function):
        return run_together(function, device=torch.device("cpu"), forget=lambda: forgotten.append(1))

    assert run(lambda: "result") == "result"
    assert not forgotten
    for stop in (out_of_memory, failed):
        with pytest.raises((RuntimeError, ValueError), match=r"can't allocate|its own"):
            run(stop)
    assert forgotten == [1, 1]
