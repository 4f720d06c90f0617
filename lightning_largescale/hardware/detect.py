"""What there is on this machine: devices, memory under limits, disks, links, processes. Nothing is measured.

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

# Number of processes on this node as torchrun, Open MPI and MPICH tell them; a ClusterEnvironment knows only the
# world's.
_LOCAL_WORLD_VARIABLES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

# The first start of a driver, of many devices, waits for them.
_IDLE_SECONDS = 60.0


def detect(
    *,
    accelerator: str | None = None,
    environment: ClusterEnvironment | None = None,
    ranks_per_node: int | None = None,
    nodes: int | None = None,
) -> Hardware:
    """What `Hardware.detect` returns; its docstring has the arguments and errors.

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
    """Of CUDA's current device the name, the free bytes and all bytes; of all devices the names that NVML has.

    Asked in a fork where this process has not initialised CUDA: it has no context after it then, and may start ranks
    that are forks.

    Args:
        count: of devices.
    """
    # To measure a machine without CUDA, nothing of lightning is imported.
    from lightning_largescale.apart import ApartError, run_apart

    look = partial(_look_at_devices, count)
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Drivers exist that were begun with otherwise: then nothing is to be kept apart any more.
        with contextlib.suppress(ApartError):
            return run_apart(look, idle=_IDLE_SECONDS, what="CUDA's devices are looked at")
    return look()


def _look_at_devices(count: int) -> tuple[str, int, int, list[str]]:
    free_bytes, all_bytes = torch.cuda.mem_get_info()
    # By UUID, since NVML numbers the devices without regard to CUDA_VISIBLE_DEVICES.
    names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    return torch.cuda.get_device_name(), free_bytes, all_bytes, names


def device_kind(accelerator: str | None) -> str:
    """The kind of device, "cpu" or "cuda", of Lightning's name of an accelerator.

    Raises:
        PlanError: another accelerator, or CUDA where torch sees no device.
    """
    # Counted through NVML, where asking whether CUDA is available begins with the driver.
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
    """Nodes, and processes on each: as given, else as the environment says, else one node with a process a device.

    Args:
        environment: Lightning's cluster environment; None asks the process group where one is up.
        ranks_per_node: as given by the caller.
        nodes: as given by the caller.
        devices: devices of this node.

    Raises:
        PlanError: a count that is no whole number above 0, or counts that do not multiply to the world's.
    """
    for name, count in (("ranks_per_node", ranks_per_node), ("nodes", nodes)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise PlanError(f"{name}={count!r} is not accepted; give a whole number, 1 or more.")
    # One process that is planned for alone may stand beside others, in an environment that cannot answer.
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
    """CPU cores that this process may run on: its affinity mask, or all where the system has none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's own name, from /proc/cpuinfo where there is one."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


def interconnect(names: list[str]) -> str | None:
    """How the node's devices are linked: "NVLink" where every pair has a direct path of it, else "PCIe".

    None with fewer than two, and where NVML or its Python module (nvidia-ml-py) is not there to ask.

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
    """Processes in all; None where nothing tells."""
    if environment is not None:
        return environment.world_size()
    return comm.world_size() if comm.is_connected() else None


def _local_world_size() -> int | None:
    for name in _LOCAL_WORLD_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    # Slurm says it for every node, "4(x2)" where they are alike.
    slurm = os.environ.get("SLURM_TASKS_PER_NODE", "").partition("(")[0]
    return int(slurm) if slurm.isdecimal() and int(slurm) > 0 else None
