"""The mesh of a plan: an axis only where there is something to do along it."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from ranks import ranks

from lightning_largescale.parallel.mesh import build_mesh, data_group, warn_of_distance
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


def groups_of_many_fits(folder):
    """Threads of this rank after the first mesh of each kind, after more of them, and with another default group."""
    plans = [Plan(dp_shard=2, dp_replicate=2), Plan(dp_shard=2, tp=2), Plan(dp_replicate=2, tp=2)]

    def threads():
        meshes = [build_mesh(plan, "cpu") for plan in plans]
        sums = [data_group(mesh) for mesh in meshes]
        for group in (*sums, *(group for mesh in meshes for group in mesh.get_all_groups())):
            one = torch.ones(())
            dist.all_reduce(one, group=group)
            assert one == group.size()
        return len(os.listdir("/proc/self/task"))

    rank, counts = int(os.environ["RANK"]), []
    for number in range(2):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=4)
        counts.append([threads() for _ in range(4)])
        dist.barrier()
        dist.destroy_process_group()
    return counts


def test_groups_are_made_once_for_the_default_group(tmp_path):
    with ranks(4) as made:
        for first, second in made.run(groups_of_many_fits, tmp_path):
            assert len({*first}) == len({*second}) == 1
            assert second[0] <= first[0]


def test_more_ranks_of_tensor_parallelism_than_a_node_has():
    with pytest.warns(UserWarning, match="tp=4 is more than the 2 devices of a node, so .*; tp=2 keeps them inside"):
        warn_of_distance(Plan(tp=4), 2)
    warn_of_distance(Plan(tp=2, dp_shard=2), 2)
