"""torch's own clipping, of shards and of a mix of them on several meshes: as of plain gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_largescale.parallel.numbers import WholeNumbers

SHAPES = [(5, 3), (4,), (1, 2), (3, 3), ()]


def parameters():
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in made[:-1]:
        parameter.grad = torch.randn(parameter.shape)
    return made


def shards():
    """The same gradients, on two meshes of the same ranks and on none."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    meshes = [init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("a", "b")]
    made = parameters()
    for index, mesh in ((0, meshes[0]), (1, meshes[0]), (2, meshes[1])):
        whole = made[index]
        made[index] = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        made[index].grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
    return made


def full(gradient):
    return gradient if gradient is None or type(gradient) is torch.Tensor else gradient.full_tensor()


def clip_shards(limit, foreach):
    by_norm, by_value = shards(), shards()
    with WholeNumbers():
        norm = clip_grad_norm_(by_norm, limit, foreach=foreach)
        clip_grad_value_(by_value, limit, foreach=foreach)
    return type(norm) is torch.Tensor, float(norm), [[full(p.grad) for p in group] for group in (by_norm, by_value)]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_as_torch_clips_plain_gradients(two, limit, foreach):
    by_norm, by_value = parameters(), parameters()
    norm = clip_grad_norm_(by_norm, limit)
    clip_grad_value_(by_value, limit)
    for plain, found, gradients in two.run(clip_shards, limit, foreach):
        assert plain
        assert found == pytest.approx(float(norm), rel=1e-6)
        for group, expected in zip(gradients, (by_norm, by_value), strict=True):
            torch.testing.assert_close(group, [p.grad for p in expected])
