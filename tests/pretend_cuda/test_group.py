"""Collectives of the pretended device: on streams, in one order."""

import os

import pytest
import torch
import torch.distributed as dist

import pretend_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(pretend_cuda.installed() is None, reason="no device is pretended"),
]


def with_nccl(function, *args):
    """What a function returns on a rank, or the error in words, and the kinds of what the device reports of it."""
    device, rank = pretend_cuda.installed(), int(os.environ["RANK"])
    device.set_report_file("")
    device.clear_reports()
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    try:
        found = function(rank, *args)
    except RuntimeError as error:
        found = str(error)
    finally:
        torch.cuda.synchronize()
        dist.destroy_process_group()
        device.set_report_file(pretend_cuda.report_file())
    return found, sorted({report.split(":")[0] for report in device.reports()})


def reduces(rank, waits):
    values = torch.full((1024,), rank + 1.0, device="cuda")
    work = dist.all_reduce(values, async_op=True)
    if waits:
        work.wait()
    return (values * 2).sum().item()


def lets_go(rank):
    dist.all_reduce(torch.ones(1024, device="cuda"), async_op=True)
    return torch.zeros(1024, device="cuda").sum().item()


def averages(rank):
    values = torch.full((4,), rank + 1.0, device="cuda")
    dist.all_reduce(values, op=dist.ReduceOp.AVG)
    shard = torch.empty(2, device="cuda")
    shards = [*(torch.arange(4.0, device="cuda") * (rank + 1)).view(2, 2)]
    dist.reduce_scatter(shard, shards, op=dist.ReduceOp.AVG)
    gathered = [torch.empty(2, device="cuda") for _ in range(2)]
    dist.all_gather(gathered, shard)
    return values.tolist(), torch.cat(gathered).tolist()


def calls_others(rank):
    values = torch.ones(4, device="cuda")
    if rank == 0:
        dist.all_reduce(values)
    else:
        dist.broadcast(values, 0)


def enters_groups_in_turn(rank):
    one, other = dist.new_group([0, 1]), dist.new_group([0, 1])
    both = torch.ones(2, 4, device="cuda")
    works = [
        dist.all_reduce(values, group=group, async_op=True) for group, values in zip((one, other), both, strict=True)
    ]
    for work in works:
        work.wait()
    return both.tolist()


def uses_the_other_device(rank):
    dist.all_reduce(torch.ones(4, device=f"cuda:{1 - rank}"))


def test_who_waits_has_the_sum(two):
    assert two.run(with_nccl, reduces, True) == [(2 * 3 * 1024.0, [])] * 2


def test_who_does_not_wait_is_told_of(two):
    assert [kinds for _, kinds in two.run(with_nccl, reduces, False)] == [["race"]] * 2


def test_what_nobody_waits_for_is_kept(two):
    assert two.run(with_nccl, lets_go) == [(0.0, [])] * 2


def test_averages(two):
    assert two.run(with_nccl, averages) == [(([1.5] * 4, [0.0, 1.5, 3.0, 4.5]), [])] * 2


def test_other_collectives_are_refused(two):
    for said, kinds in two.run(with_nccl, calls_others):
        assert "calls another one as number" in said
        assert kinds == ["order"]


def test_groups_of_the_same_members_in_one_order(two):
    assert two.run(with_nccl, enters_groups_in_turn) == [([[2.0] * 4] * 2, [])] * 2


def test_a_tensor_of_another_device_is_refused(two):
    for rank, (said, kinds) in enumerate(two.run(with_nccl, uses_the_other_device)):
        assert f"nccl on cuda:{rank} was given a tensor of cuda:{1 - rank}" in said
        assert kinds == ["context"]
