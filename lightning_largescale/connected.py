"""ConnectedStrategy: the processes of a run, their ranks and their collectives, independent of any model."""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import ParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_largescale import comm, compat
from lightning_largescale.errors import PlanError
from lightning_largescale.groups import connect, end_groups
from lightning_largescale.launch import watch_peers

_Value = TypeVar("_Value")
# World sizes that earlier Trainers of this process asked for and connected.
_asked_before: set[int] = set()


class ConnectedStrategy(ParallelStrategy, ABC):
    """Strategy with one process per device, connected by torch.distributed; a single process has no process group.

    If the cluster environment knows the world size by itself, it takes precedence over the Trainer's arguments.

    Args:
        process_group_backend: torch.distributed's name of the backend; None selects the device's default.
        timeout: the time that a collective may wait for the other ranks.
    """

    def __init__(self, *, process_group_backend: str | None, timeout: timedelta | None) -> None:
        super().__init__()
        self.num_nodes = 1
        # World size that the environment reports, if it differs from the Trainer's.
        self._environment_ranks: int | None = None
        self._ranks_per_node: int | None = None
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        # Callbacks with which teardown reverts changes.
        self._undo = contextlib.ExitStack()

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The trainer's accelerator: CPU or CUDA."""
        return super().accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and not isinstance(accelerator, CPUAccelerator | CUDAAccelerator):
            name = type(accelerator).__name__.removesuffix("Accelerator").lower()
            raise PlanError(
                f"accelerator={name!r} is not one that {type(self).__name__} trains on;"
                " use accelerator='cpu' or 'cuda'."
            )
        ParallelStrategy.accelerator.fset(self, accelerator)  # type: ignore[attr-defined]

    @property
    @override
    def local_rank(self) -> int:
        """Rank of this process on its node.

        It is 0 for a Trainer with one device, even if the process was launched with others: a script that trained on
        several devices may go on with each process by itself.
        """
        return super().local_rank if self.has_peers else 0

    @property
    @override
    def global_rank(self) -> int:
        """Rank of this process among all processes."""
        return super().global_rank if self.has_peers else 0

    @property
    @override
    def node_rank(self) -> int:
        """Rank of this process's node; the environment is queried only if the run is distributed."""
        return super().node_rank if self.is_distributed else 0

    @property
    @override
    def world_size(self) -> int:
        """Number of processes."""
        return self._environment_ranks or self._asked_ranks

    @property
    @override
    def root_device(self) -> torch.device:
        """The device of this rank.

        Raises:
            PlanError: the Trainer has fewer devices than there are ranks on this node.
        """
        devices, rank = self.parallel_devices or [torch.device("cpu")], self.local_rank
        if rank < len(devices):
            return devices[rank]
        # Each process may see only its own device.
        if devices[0].type == "cpu" or torch.cuda.device_count() == 1:
            return devices[0]
        raise PlanError(
            f"devices={len(devices)} has none for local rank {rank} of {type(self.cluster_environment).__name__};"
            " set devices to the number of processes on a node."
        )

    @property
    def num_processes(self) -> int:
        """Number of ranks on this node; before the ranks are connected, the number of devices of the Trainer."""
        return self._ranks_per_node or len(self.parallel_devices or ())

    @property
    def _asked_ranks(self) -> int:
        """Number of processes that the Trainer's arguments ask for."""
        return max(1, len(self.parallel_devices or ()) * self.num_nodes)

    @property
    def is_distributed(self) -> bool:
        """Return whether loaders are sharded among ranks; False when Lightning's batch size finder asks."""
        return self.has_peers and not compat.asked_by_batch_size_finder()

    @property
    def has_peers(self) -> bool:
        """Return whether there are other ranks."""
        return self.world_size > 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Arguments of a DistributedSampler: all ranks are data parallel."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """torch.distributed's name of the backend."""
        return self._process_group_backend

    @property
    def _default_backend(self) -> str:
        """Default backend of the root device, and of the CPU if tensors in DRAM may have to be reduced."""
        if self.root_device.type == "cpu":
            return "gloo"
        return "cpu:gloo,cuda:nccl" if self._sums_in_dram else "nccl"

    @property
    @abstractmethod
    def _sums_in_dram(self) -> bool:
        """Return whether gradients may be offloaded to DRAM, so that their norms are summed over the ranks there."""

    def set_world_ranks(self) -> None:
        """Set the rank and world size of the cluster environment, and adopt its world size if it reports another.

        A single process sets nothing: it may be a rank of another Trainer, whose fit is running.

        Raises:
            PlanError: the environment reports another world size than the number of processes to be started.
        """
        environment, asked = self.cluster_environment, self._asked_ranks
        if environment is not None and asked > 1:
            rank = environment.node_rank() * len(self.parallel_devices or ()) + environment.local_rank()
            environment.set_global_rank(rank)
            environment.set_world_size(asked)
        known = _ranks_of(environment)
        # A script that trained on all ranks may go on with each process by itself.
        alone = asked == 1 and known in _asked_before
        self._environment_ranks = None if known == asked or alone else known
        if self.has_peers:
            compat.set_rank_zero(self.global_rank)
        ranks = self._environment_ranks
        if ranks and asked > 1 and environment is not None and not environment.creates_processes_externally:
            raise PlanError(
                f"devices={len(self.parallel_devices or ())} of num_nodes={self.num_nodes} are to be started as"
                f" {asked} processes, and {type(environment).__name__} has {ranks}; set them to make as many, or let"
                " its creates_processes_externally be True."
            )

    @override
    def setup_environment(self) -> None:
        """Initialize the process group; a single process has none.

        Raises:
            PlanError: a process group of another world size is initialized already.
        """
        super().setup_environment()
        self.set_world_ranks()
        if self.has_peers:
            reset_seed()
            backend = self._process_group_backend = self._process_group_backend or self._default_backend
            connect(self.cluster_environment, backend, self.root_device, self._timeout)
            if comm.world_size() != self.world_size:
                raise PlanError(
                    f"{type(self.cluster_environment).__name__} has {self.world_size} processes and torch.distributed"
                    f" connects {comm.world_size()}; destroy that process group before the Trainer is run, or make"
                    " it of as many."
                )
            self._count_nodes()
            watch_peers(self)
        else:
            if dist.is_initialized() and comm.world_size() not in {1, *_asked_before}:
                rank_zero_warn(
                    f"torch.distributed connects {comm.world_size()} processes and the Trainer trains in this one"
                    " alone; give it the cluster environment that started them, as in"
                    " plugins=[RayLightningEnvironment()], or as many devices."
                )
            self._undo.callback(compat.set_rank_zero, compat.set_rank_zero(0))

    def _count_nodes(self) -> None:
        """Count the ranks per node; for nodes of different sizes, use the greatest common divisor of the sizes."""
        if self._environment_ranks is None:
            _asked_before.add(self.world_size)
            return
        nodes = comm.all_gather_object(self.node_rank)
        self._ranks_per_node = math.gcd(*Counter(nodes).values())

    def connect_alone(self) -> None:
        """Initialize a process group of world size 1 for a single process until teardown, for code that needs one.

        Raises:
            PlanError: the process is in a process group of several ranks already.
        """
        if self.has_peers or (dist.is_initialized() and comm.world_size() == 1):
            return
        if dist.is_initialized():
            raise PlanError(
                "offload in a Trainer of one device needs a process group of one, and this process is in one of"
                f" {comm.world_size()}; give the Trainer as many devices, or call"
                " torch.distributed.destroy_process_group() first."
            )
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(self._default_backend, store=store, rank=0, world_size=1)
        self._undo.callback(end_groups)
        # Lightning takes any process group for one of several processes.
        self._undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\(.*sync_dist=True")

    def _meet_peers(self) -> None:
        """Wait, in a step whose ranks may run different modules, until all are about to enter a collective."""

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank reaches the barrier."""
        self._meet_peers()
        if self.has_peers and dist.is_initialized():
            comm.barrier(self.root_device)

    @override
    def broadcast(self, obj: _Value, src: int = 0) -> _Value:
        """Return rank `src`'s `obj` on every rank."""
        if not (self.has_peers and dist.is_initialized()):
            return obj
        self._meet_peers()
        return comm.broadcast_object(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return every rank's `tensor`, stacked; in a single process, `tensor` itself."""
        self._meet_peers()
        return super().all_gather(tensor, group, sync_grads) if self.has_peers else tensor

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce `tensor` over all ranks; return other objects unchanged."""
        if not (self.has_peers and isinstance(tensor, Tensor)):
            return tensor
        self._meet_peers()
        return compat.reduce_tensor(tensor, group, reduce_op)


def _ranks_of(environment: ClusterEnvironment | None) -> int | None:
    """Return the world size that `environment` reports by itself.

    If its variables are not set, return the initialized process group's. Return None without a process group, and
    for an environment that only repeats the world size that was set.
    """
    # Lightning's own environment repeats the world size that the last Trainer has set.
    if environment is None or type(environment).world_size is LightningEnvironment.world_size:
        return None
    try:
        return environment.world_size()
    except (KeyError, ValueError, RuntimeError):
        # Its variables are not set: the launcher did not start this process, or they were unset since.
        return comm.world_size() if dist.is_initialized() else None
