"""Clipping: as torch does it, on plain gradients, shards, and a mix of them on several meshes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from lightning_largescale.parallel.clip import clip_gradients_by_norm, clip_gradients_by_value

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


def clip_shards(limit):
    by_norm, by_value = shards(), shards()
    norm = clip_gradients_by_norm(by_norm, limit)
    clip_gradients_by_value(by_value, limit)
    return type(norm) is torch.Tensor, float(norm), [[full(p.grad) for p in group] for group in (by_norm, by_value)]


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_as_torch_clips_plain_gradients(two, limit):
    by_norm, by_value = parameters(), parameters()
    norm = clip_grad_norm_(by_norm, limit)
    clip_grad_value_(by_value, limit)
    ours = parameters()
    assert clip_gradients_by_norm(ours, limit) == norm
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in by_norm], rtol=0, atol=0)
    for plain, found, gradients in two.run(clip_shards, limit):
        assert plain
        assert found == pytest.approx(float(norm), rel=1e-6)
        for group, expected in zip(gradients, (by_norm, by_value), strict=True):
            torch.testing.assert_close(group, [p.grad for p in expected])


def test_nothing_to_clip():
    assert clip_gradients_by_norm([nn.Parameter(torch.ones(2))], 1.0) == 0
    clip_gradients_by_value([nn.Parameter(torch.ones(2))], 1.0)
