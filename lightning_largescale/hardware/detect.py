"""Detection of this machine: devices, memory under limits, disks, links, processes. Nothing is measured.

Source: torch.cuda (mem_get_info, get_device_properties); NVML API reference (nvmlDeviceGetP2PStatus);
lightning.fabric.plugins.environments.ClusterEnvironment.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_largescale import comm
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.disks import disks
from lightning_largescale.hardware.hardware import Hardware
from lightning_largescale.hardware.memory_limits import rank_memory

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

# Number of processes on this node, as torchrun, Open MPI and MPICH set it; a ClusterEnvironment knows only the world
# size.
_LOCAL_WORLD_VARIABLES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

# The first start of a driver waits for all its devices.
_IDLE_SECONDS = 60.0


def detect(
    *,
    accelerator: str | None = None,
    environment: ClusterEnvironment | None = None,
    ranks_per_node: int | None = None,
    nodes: int | None = None,
) -> Hardware:
    """Implement `Hardware.detect`, whose docstring has the arguments and errors.

    Source: the module's docstring.
    """
    kind = device_kind(accelerator)
    devices = torch.cuda.device_count() if kind == "cuda" else 1
    nodes, ranks_per_node = layout(environment, ranks_per_node, nodes, devices=devices)
    dram_bytes, dram_available_bytes = rank_memory(ranks_per_node)
    names: list[str] = []
    if kind == "cuda":
        name, memory_free_bytes, memory_bytes, names = cuda_devices(devices)
    else:
        name = cpu_name()
        memory_free_bytes, memory_bytes = dram_available_bytes, dram_bytes
    return Hardware(
        kind=kind,
        name=name,
        memory_bytes=memory_bytes,
        memory_free_bytes=memory_free_bytes,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        cores=cores(),
        dram_bytes=dram_bytes,
        dram_available_bytes=dram_available_bytes,
        disks=disks(),
        interconnect=interconnect(names),
        origin="detected",
    )


def cuda_devices(count: int) -> tuple[str, int, int, list[str]]:
    """Return the name, free bytes and total bytes of CUDA's current device, and the NVML names of all devices.

    If this process has not initialized CUDA, a forked child looks at the devices, so that this process stays without a
    CUDA context and may still fork ranks.

    Args:
        count: number of devices.
    """
    # Imported here so that a machine without CUDA is detected without importing Lightning.
    from lightning_largescale.apart import ApartError, run_apart

    look = partial(_look_at_devices, count)
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # The driver may have been initialized by other means than torch. The child then fails, and a fork protects
        # nothing any more.
        with contextlib.suppress(ApartError):
            return run_apart(look, idle=_IDLE_SECONDS, what="CUDA's devices are looked at")
    return look()


def _look_at_devices(count: int) -> tuple[str, int, int, list[str]]:
    free_bytes, all_bytes = torch.cuda.mem_get_info()
    # By UUID, because NVML numbers the devices without regard to CUDA_VISIBLE_DEVICES.
    names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    return torch.cuda.get_device_name(), free_bytes, all_bytes, names


def device_kind(accelerator: str | None) -> str:
    """Return the kind of device, "cpu" or "cuda", for Lightning's name of an accelerator.

    Raises:
        PlanError: the accelerator is another one, or CUDA and torch sees no device.
    """
    # Devices are counted through NVML; asking whether CUDA is available would initialize the driver.
    sees_cuda = torch.cuda.device_count() > 0
    if accelerator in (None, "auto"):
        return "cuda" if sees_cuda else "cpu"
    if accelerator == "cpu":
        return "cpu"
    if accelerator not in ("cuda", "gpu"):
        raise PlanError(f"accelerator={accelerator!r} cannot be planned for; accepted: cpu, cuda.")
    if not sees_cuda:
        raise PlanError(f"accelerator={accelerator!r} was given and torch sees no CUDA device; use 'cpu' here.")
    return "cuda"


def layout(
    environment: ClusterEnvironment | None, ranks_per_node: int | None, nodes: int | None, *, devices: int
) -> tuple[int, int]:
    """Return the number of nodes and of processes on each.

    As given, else as the environment says, else one node with one process per device.

    Args:
        environment: Lightning's cluster environment; None uses the process group, if one is up.
        ranks_per_node: the number given by the caller, or None.
        nodes: the number given by the caller, or None.
        devices: number of devices of this node.

    Raises:
        PlanError: a count is no whole number above 0, or the counts do not multiply to the world size.
    """
    for name, count in (("ranks_per_node", ranks_per_node), ("nodes", nodes)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise PlanError(f"{name}={count!r} is not accepted; give a whole number, 1 or more.")
    # A plan for one process may be made beside other processes, in an environment that cannot answer.
    world = None if nodes == ranks_per_node == 1 else _world_size(environment)
    if world is None:
        return nodes or 1, ranks_per_node or devices
    if ranks_per_node is None:
        local = _local_world_size()
        ranks_per_node = max(1, world // nodes) if nodes else local if local and world % local == 0 else world
    nodes = nodes or max(1, world // ranks_per_node)
    if nodes * ranks_per_node != world:
        raise PlanError(
            f"nodes={nodes}, ranks_per_node={ranks_per_node} makes {nodes * ranks_per_node} and there are {world}"
            f" processes; nodes * ranks_per_node must be {world}."
        )
    return nodes, ranks_per_node


def cores() -> int:
    """Return the number of CPU cores this process may run on: its affinity mask, or all if the system has none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name(root: Path = Path("/")) -> str:
    """Return the processor's name, from /proc/cpuinfo if it exists."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


def interconnect(names: list[str]) -> str | None:
    """Return how the node's devices are linked: "NVLink" if every pair has a direct NVLink path, else "PCIe".

    None with fewer than two devices, and if NVML or its Python module (nvidia-ml-py) is not available.

    Args:
        names: the devices' NVML names, "GPU-" and the UUID.

    Source: NVML API reference, nvmlDeviceGetP2PStatus and NVML_P2P_CAPS_INDEX_NVLINK.
    """
    if len(names) < 2:
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        linked = all(
            nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK
            for one, other in combinations(handles, 2)
        )
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
    return "NVLink" if linked else "PCIe"


def _world_size(environment: ClusterEnvironment | None) -> int | None:
    """Return the world size; None if it is unknown."""
    if environment is not None:
        return environment.world_size()
    return comm.world_size() if comm.is_connected() else None


def _local_world_size() -> int | None:
    for name in _LOCAL_WORLD_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    # Slurm lists the count of every node, as "4(x2)" if they are equal.
    slurm = os.environ.get("SLURM_TASKS_PER_NODE", "").partition("(")[0]
    return int(slurm) if slurm.isdecimal() and int(slurm) > 0 else None
