"""The DeviceMesh of a Plan.

Source: torch.distributed.device_mesh; Zhao et al. 2023, "PyTorch FSDP", section 3.2 (hybrid sharding).
"""

from __future__ import annotations

import weakref

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_largescale import comm, compat
from lightning_largescale.groups import made_once
from lightning_largescale.plan import Plan

_in_use: list[weakref.ref[DeviceMesh]] = []


def build_mesh(plan: Plan, device_type: str) -> DeviceMesh | None:
    """The mesh that parameters are sharded over, or None where the plan gathers nothing.

    Creates process groups if there were none of its kind yet, so it is a collective of all ranks.

    Args:
        plan: its sizes multiply to the number of processes.
        device_type: "cpu" or "cuda".

    Returns:
        Axes ("dp_replicate", "dp_shard", "tp"): ranks of one node are neighbours along the last. The first only where
        there is more than one replica, since FSDP2 reduces gradients over every axis it is given; the last likewise.
    """
    if not plan.gathers:
        return None
    axes = {"dp_replicate": plan.dp_replicate, "dp_shard": plan.dp_shard, "tp": plan.tp}
    kept = {name: size for name, size in axes.items() if name == "dp_shard" or size > 1}
    sizes, names = tuple(kept.values()), tuple(kept)
    # Of gradients in DRAM norms are summed there.
    sums_in_dram = device_type != "cpu" and plan.offload_parameters is not None
    backend = "cpu:gloo,cuda:nccl" if sums_in_dram and dist.get_backend() == "nccl" else None
    mesh = made_once(
        (device_type, sizes, names, backend),
        lambda: init_device_mesh(
            device_type,
            sizes,
            mesh_dim_names=names,
            backend_override=dict.fromkeys(names, backend) if backend else None,
        ),
    )
    use_mesh(mesh)
    return mesh


def use_mesh(mesh: DeviceMesh) -> None:
    """Have what is computed from now on have the groups of `mesh`, and not those of one that is like it."""
    if _in_use and _in_use[0]() is not mesh:
        compat.forget_cached_meshes(mesh.device_type)
    _in_use[:] = [weakref.ref(mesh)]


def warn_of_distance(plan: Plan, ranks_per_node: int) -> None:
    """Say so where the ranks of tensor parallelism are not all on one node.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 3.2.
    """
    if plan.tp > ranks_per_node:
        rank_zero_warn(
            f"tp={plan.tp} is more than the {ranks_per_node} devices of a node, so every block's activations travel"
            f" between nodes; tp={ranks_per_node} keeps them inside."
        )


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes of `mesh` whose ranks see other data; FSDP2 divides over these."""
    names = mesh.mesh_dim_names or ()
    return mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that together see each sample once, this one among them: a collective where there are replicas."""
    if "dp_replicate" not in (mesh.mesh_dim_names or ()):
        group: dist.ProcessGroup = mesh.get_group("dp_shard")
        return group
    return _group_over_data(mesh, "data")


def agreement_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The same ranks, in a gloo group of its own, where they tell one another what they do: a collective."""
    return _group_over_data(mesh, "agreement", backend="gloo")


def tensor_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that compute parts of the same samples, in a gloo group of its own: a collective."""
    return _own_group("order", mesh.mesh.reshape(-1, mesh.size(-1)).tolist(), backend="gloo")


def _group_over_data(mesh: DeviceMesh, purpose: str, backend: str | None = None) -> dist.ProcessGroup:
    tensor_ranks = 1 if tensor_mesh(mesh) is None else mesh.size(-1)
    return _own_group(purpose, mesh.mesh.reshape(-1, tensor_ranks).t().tolist(), backend)


def _own_group(purpose: str, parts: list[list[int]], backend: str | None) -> dist.ProcessGroup:
    """That of `parts` in which this rank is, as a group; all of them are made."""
    key = purpose, tuple(map(tuple, parts))
    groups: list[dist.ProcessGroup] = made_once(
        key, lambda: [dist.new_group(ranks, backend=backend) for ranks in parts]
    )
    return next(group for group, ranks in zip(groups, parts, strict=True) if comm.rank() in ranks)


def tensor_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The axis of `mesh` whose ranks compute parts of the same samples; None where there is none."""
    return mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else None
