"""The mesh of a plan: an axis only where there is something to do along it."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lightning_largescale.parallel.mesh import build_mesh, warn_of_distance
from lightning_largescale.plan import Plan


def axes(plan):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = build_mesh(plan, "cpu")
    return mesh and (mesh.mesh_dim_names, tuple(mesh.shape), tuple(mesh.get_coordinate()))


def test_axes(two, four):
    assert two.run(axes, Plan(dp_replicate=2)) == [None, None]
    assert two.run(axes, Plan(dp_shard=2)) == [(("dp_shard",), (2,), (rank,)) for rank in range(2)]
    names = ("dp_replicate", "dp_shard")
    assert four.run(axes, Plan(dp_replicate=2, dp_shard=2)) == [
        (names, (2, 2), (i, j)) for i in range(2) for j in range(2)
    ]
    assert two.run(axes, Plan(tp=2)) == [(("dp_shard", "tp"), (1, 2), (0, rank)) for rank in range(2)]
    names = ("dp_replicate", "dp_shard", "tp")
    assert four.run(axes, Plan(dp_replicate=2, tp=2)) == [
        (names, (2, 1, 2), (i, 0, j)) for i in range(2) for j in range(2)
    ]


def test_more_ranks_of_tensor_parallelism_than_a_node_has():
    with pytest.warns(UserWarning, match="tp=4 is more than the 2 devices of a node, so .*; tp=2 keeps them inside"):
        warn_of_distance(Plan(tp=4), 2)
    warn_of_distance(Plan(tp=2, dp_shard=2), 2)
