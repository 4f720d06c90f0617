import sys
import weakref

import torch
import torch.distributed as dist
from ranks import run_connected
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_largescale import compat
from lightning_largescale.apart import run_apart


def gather_and_scatter():
    rank, world = dist.get_rank(), dist.get_world_size()
    gathered, part = torch.zeros(2 * world), torch.zeros(2)
    compat.all_gather_tensor(gathered, torch.full((2,), float(rank)))
    compat.reduce_scatter_tensor(part, gathered + rank)
    return gathered.tolist(), part.tolist()


def test_all_gather_and_reduce_scatter():
    answers = run_connected(2, gather_and_scatter)
    assert answers == [([0.0, 0.0, 1.0, 1.0], [1.0, 1.0]), ([0.0, 0.0, 1.0, 1.0], [3.0, 3.0])]


def test_abort_process_groups():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    compat.abort_process_groups()
    assert not dist.is_initialized()


def test_forget_groups_of():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("x",))
    group = weakref.ref(dist.group.WORLD)
    compat.forget_groups_of(mesh)
    assert mesh.get_group() is group()
    dist.destroy_process_group()
    assert group() is None


def fake_in_a_fork():
    def alone():
        compat.fake_process_group()
        dist.barrier()
        return dist.get_rank(), dist.get_backend()

    answer = run_apart(alone)
    dist.barrier()
    return answer


def test_fake_process_group():
    assert run_connected(2, fake_in_a_fork) == [(0, "fake"), (1, "fake")]


def reduced_gradients():
    module = nn.Sequential(nn.Linear(2, 1))
    compat.ignore_parameters(module, ["0.bias"])
    replica = nn.parallel.DistributedDataParallel(module)
    (replica(torch.ones(1, 2)).sum() * (1 + dist.get_rank())).backward()
    return module[0].weight.grad.tolist(), module[0].bias.grad.tolist()


def test_ignore_parameters():
    assert run_connected(2, reduced_gradients) == [([[1.5, 1.5]], [1.0]), ([[1.5, 1.5]], [2.0])]


def test_is_collective():
    seen = []

    class Operators(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.name(), compat.is_collective(func)))
            return func(*args, **(kwargs or {}))

    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    try:
        with Operators():
            dist.all_reduce(torch.ones(1))
            dist.send(torch.ones(1), 1)
            torch.ones(1).add_(1)
    finally:
        dist.destroy_process_group()
    assert {name: said for name, said in seen if "ones" not in name} == {
        "c10d::allreduce_": True, "c10d::send": False, "aten::add_.Tensor": False,
    }  # fmt: skip


def test_calls_collective():
    # How each collective, and what is none, looks from outside is in test_waiting.py, by threads that wait there.
    assert not compat.calls_collective(sys._getframe())
