from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_connected
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_largescale import compat

CLEARS = {"x": compat.forget_cached_meshes, "y": partial(compat.forget_cached_meshes_of_backward, "cpu")}


@pytest.mark.parametrize("name", CLEARS)
def test_forget_cached_meshes(name):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    one, other = (init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for _ in range(2))
    for mesh in (one, other):
        tensor = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
        # Of the first that was met: where that changes, nothing is to be forgotten.
        assert (tensor + tensor).device_mesh is one
    CLEARS[name]()
    assert (tensor + tensor).device_mesh is other
    dist.destroy_process_group()


def divided_elsewhere():
    """A part in DRAM of a tensor whose mesh is of another device; torch has none that is always there but meta."""
    mesh = DeviceMesh("meta", [0, 1])
    like = DTensor.from_local(torch.empty(3, 4, device="meta"), mesh, [Shard(0)], run_check=False)
    part = torch.ones(3, 4, dtype=torch.bfloat16)
    whole = compat.divided_as(like, part)
    moved = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    return (
        (whole.shape, whole.dtype, whole.placements) == (like.shape, part.dtype, like.placements),
        whole.to_local().data_ptr() == part.data_ptr(),
        moved.device.type,
    )


def second_derivative():
    compat.differentiate_placing_twice()
    compat.differentiate_placing_twice()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4), torch.randn(6, 4)

    def slopes(given, of):
        out = given(x.requires_grad_()) @ of.t()
        (slope,) = torch.autograd.grad(out.tanh().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(slope.square().sum(), of)
        return found

    plain = slopes(lambda tensor: tensor, weight.clone().requires_grad_())
    local = weight.chunk(2)[dist.get_rank()].clone()
    placed = DTensor.from_local(local, mesh, [Shard(0)]).requires_grad_()
    found = slopes(lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()], run_check=False), placed)
    torch.testing.assert_close(found.full_tensor(), plain)
    return True


def test_differentiate_placing_twice():
    assert all(run_connected(2, second_derivative))


def test_divided_as():
    # Should the last no longer be so, `from_local` can take its place.
    assert run_connected(2, divided_elsewhere) == [(True, True, "meta")] * 2
