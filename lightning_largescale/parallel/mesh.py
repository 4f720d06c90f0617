"""The DeviceMesh of a plan, and its process groups.

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
    """Return the mesh that parameters are sharded over; None if the plan gathers nothing.

    Creates the process groups unless an equal mesh was built before, so it is a collective of all ranks.

    Args:
        plan: the plan; its sizes multiply to the world size.
        device_type: "cpu" or "cuda".

    Returns:
        A mesh with the axes ("dp_replicate", "dp_shard", "tp"); ranks of one node are neighbours along the last.
        "dp_replicate" and "tp" exist only if their size is above 1, since FSDP2 reduces gradients over every axis.
    """
    if not plan.gathers:
        return None
    axes = {"dp_replicate": plan.dp_replicate, "dp_shard": plan.dp_shard, "tp": plan.tp}
    kept = {name: size for name, size in axes.items() if name == "dp_shard" or size > 1}
    sizes, names = tuple(kept.values()), tuple(kept)
    # Norms of gradients in DRAM are reduced there, which needs gloo.
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
    """Make later DTensor operations use the process groups of `mesh`, not those of an equal mesh built before."""
    if _in_use and _in_use[0]() is not mesh:
        compat.forget_cached_meshes_of_backward(mesh.device_type)
    _in_use[:] = [weakref.ref(mesh)]


def warn_of_distance(plan: Plan, ranks_per_node: int) -> None:
    """Warn if the tensor-parallel ranks are not all on one node.

    Source: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 3.2.
    """
    if plan.tp > ranks_per_node:
        rank_zero_warn(
            f"tp={plan.tp} is more than the {ranks_per_node} devices of a node, so every block's activations travel"
            f" between nodes; tp={ranks_per_node} keeps them inside."
        )


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the data-parallel axes of `mesh`, over which FSDP2 replicates and shards."""
    names = mesh.mesh_dim_names or ()
    return mesh["dp_replicate", "dp_shard"] if "dp_replicate" in names else mesh["dp_shard"]


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the process group of this rank's data-parallel ranks; a collective if there are replicas."""
    if "dp_replicate" not in (mesh.mesh_dim_names or ()):
        group: dist.ProcessGroup = mesh.get_group("dp_shard")
        return group
    return _group_over_data(mesh, "data")


def agreement_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return a separate gloo group of the data-parallel ranks, to exchange what they are about to do; a collective."""
    return _group_over_data(mesh, "agreement", backend="gloo")


def tensor_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return a separate gloo group of this rank's tensor-parallel ranks; a collective."""
    return _own_group("order", mesh.mesh.reshape(-1, mesh.size(-1)).tolist(), backend="gloo")


def _group_over_data(mesh: DeviceMesh, purpose: str, backend: str | None = None) -> dist.ProcessGroup:
    tensor_ranks = 1 if tensor_mesh(mesh) is None else mesh.size(-1)
    return _own_group(purpose, mesh.mesh.reshape(-1, tensor_ranks).t().tolist(), backend)


def _own_group(purpose: str, parts: list[list[int]], backend: str | None) -> dist.ProcessGroup:
    """Create a process group for each of `parts`, and return the one that has this rank."""
    key = purpose, tuple(map(tuple, parts))
    groups: list[dist.ProcessGroup] = made_once(
        key, lambda: [dist.new_group(ranks, backend=backend) for ranks in parts]
    )
    return next(group for group, ranks in zip(groups, parts, strict=True) if comm.rank() in ranks)


def tensor_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """Return the tensor-parallel axis of `mesh`; None if it has none."""
    return mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else None
