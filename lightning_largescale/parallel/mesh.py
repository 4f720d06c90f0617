"""The DeviceMesh of a Plan.

Source: torch.distributed.device_mesh; Zhao et al. 2023, "PyTorch FSDP", section 3.2 (hybrid sharding).
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_largescale.plan import Plan


def build_mesh(plan: Plan, device_type: str) -> DeviceMesh | None:
    """The mesh that parameters are sharded over, or None where the plan shards nothing.

    Creates process groups, so it is a collective of all ranks.

    Args:
        plan: its sizes multiply to the number of processes.
        device_type: "cpu" or "cuda".

    Returns:
        Axes ("dp_replicate", "dp_shard"), the first only where there is more than one replica: FSDP2 reduces gradients
        over every axis it is given.
    """
    if plan.dp_shard == 1:
        return None
    if plan.dp_replicate == 1:
        return init_device_mesh(device_type, (plan.dp_shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        device_type, (plan.dp_replicate, plan.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
