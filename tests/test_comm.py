"""What ranks tell one another: objects and tensors, of all ranks or of a group, and of a process that is alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_connected

from lightning_largescale import comm
from lightning_largescale.errors import PlanError


def told():
    group, own = dist.new_group([0, 1]), comm.rank()
    summed, largest = torch.tensor([own + 1.0]), torch.tensor([own])
    comm.all_reduce(summed, group=group)
    comm.all_reduce(largest, dist.ReduceOp.MAX)
    received = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    comm.all_gather(received, torch.tensor([own]))
    of_one = torch.tensor([own])
    comm.broadcast(of_one, 1)
    return {
        "objects": comm.all_gather_object({"rank": own}, group),
        "object": comm.broadcast_object(f"of {own}", 1),
        "numbers": (summed.item(), largest.item(), of_one.item(), [one.item() for one in received]),
        "size": comm.world_size(group),
    }


def test_ranks_are_told_the_same():
    one, other = run_connected(2, told)
    assert one == other
    assert one["objects"] == [{"rank": 0}, {"rank": 1}]
    assert one["object"] == "of 1"
    assert one["numbers"] == (3.0, 1, 1, [0, 1])
    assert one["size"] == 2


def fail_on_rank_zero(fails):
    called = []

    def function():
        called.append(comm.rank())
        if fails:
            raise OSError("no space left")

    try:
        comm.run_on_rank_zero(function, "write it")
    except (OSError, PlanError) as error:
        return called, type(error).__name__, str(error)
    return called, "", ""


def test_no_rank_goes_on_where_rank_zero_fails():
    assert run_connected(2, fail_on_rank_zero, False) == [([0], "", ""), ([], "", "")]
    assert run_connected(2, fail_on_rank_zero, True) == [
        ([0], "OSError", "no space left"),
        ([], "PlanError", "rank 0 could not write it (OSError: no space left)."),
    ]


def test_a_process_without_a_group_is_alone():
    assert (comm.rank(), comm.world_size(), comm.is_connected()) == (0, 1, False)
    assert comm.all_gather_object(3) == [3]
    assert comm.broadcast_object(3) == 3
    with pytest.raises(OSError, match="no space left"):
        comm.run_on_rank_zero(lambda: (_ for _ in ()).throw(OSError("no space left")), "write it")
