"""Processes: the ranks of a run and their connection, independent of any model."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import ParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_largescale import comm, compat
from lightning_largescale.errors import PlanError
from lightning_largescale.groups import connect, end_groups
from lightning_largescale.launch import watch_peers

# World sizes that earlier Trainers of this process asked for and connected.
_asked_before: set[int] = set()


def check_accelerator(accelerator: Accelerator | None, strategy: str) -> None:
    """Raise PlanError if `accelerator` is neither the CPU nor CUDA.

    Args:
        accelerator: the Trainer's accelerator, if it has one yet.
        strategy: the name of the strategy, for the message.
    """
    if accelerator is not None and not isinstance(accelerator, CPUAccelerator | CUDAAccelerator):
        name = type(accelerator).__name__.removesuffix("Accelerator").lower()
        raise PlanError(f"accelerator={name!r} is not one that {strategy} trains on; use accelerator='cpu' or 'cuda'.")


class Processes:
    """The processes of a run, one per device, connected by torch.distributed; a single process has no process group.

    If the cluster environment knows the world size by itself, it takes precedence over the Trainer's arguments.

    Args:
        strategy: Lightning's strategy, which has the cluster environment and the devices.
        backend: torch.distributed's name of the backend; None selects the device's default.
        timeout: the time that a collective may wait for the other ranks.
        exits: callbacks that teardown calls.

    Attributes:
        num_nodes: the number of nodes, as the Trainer has it.
        backend: torch.distributed's name of the backend; None until it is selected.
    """

    def __init__(
        self,
        strategy: ParallelStrategy,
        backend: str | None,
        timeout: timedelta | None,
        exits: contextlib.ExitStack,
    ) -> None:
        self.num_nodes, self.backend = 1, backend
        self._strategy, self._timeout, self._exits = strategy, timeout, exits
        # World size that the environment reports, if it differs from the Trainer's.
        self._environment_ranks: int | None = None
        self._ranks_per_node: int | None = None
        self._sums_in_dram = False

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._environment_ranks or self._asked_ranks

    @property
    def has_peers(self) -> bool:
        """Return whether there are other ranks."""
        return self.world_size > 1

    @property
    def are_connected(self) -> bool:
        """Return whether there are other ranks, and a process group of all."""
        return self.has_peers and dist.is_initialized()

    @property
    def per_node(self) -> int:
        """Number of ranks on this node; before the ranks are connected, the number of devices of the Trainer."""
        return self._ranks_per_node or self._devices

    @property
    def _devices(self) -> int:
        return len(self._strategy.parallel_devices or ())

    @property
    def _asked_ranks(self) -> int:
        """Number of processes that the Trainer's arguments ask for."""
        return max(1, self._devices * self.num_nodes)

    def device(self, local_rank: int) -> torch.device:
        """Return the device of this rank.

        Raises:
            PlanError: the Trainer has fewer devices than there are ranks on this node.
        """
        devices = self._strategy.parallel_devices or [torch.device("cpu")]
        if local_rank < len(devices):
            return devices[local_rank]
        # Each process may see only its own device.
        if devices[0].type == "cpu" or torch.cuda.device_count() == 1:
            return devices[0]
        raise PlanError(
            f"devices={len(devices)} has none for local rank {local_rank} of"
            f" {type(self._strategy.cluster_environment).__name__}; set devices to the number of processes on a node."
        )

    def set_world_ranks(self) -> None:
        """Set the rank and world size of the cluster environment, and adopt its world size if it reports another.

        A single process sets nothing: it may be a rank of another Trainer, whose fit is running.

        Raises:
            PlanError: the environment reports another world size than the number of processes to be started.
        """
        environment, asked = self._strategy.cluster_environment, self._asked_ranks
        if environment is not None and asked > 1:
            environment.set_global_rank(environment.node_rank() * self._devices + environment.local_rank())
            environment.set_world_size(asked)
        known = _ranks_of(environment)
        # A script that trained on all ranks may go on with each process by itself.
        alone = asked == 1 and known in _asked_before
        self._environment_ranks = None if known == asked or alone else known
        if self.has_peers:
            compat.set_rank_zero(self._strategy.global_rank)
        ranks = self._environment_ranks
        if ranks and asked > 1 and environment is not None and not environment.creates_processes_externally:
            raise PlanError(
                f"devices={self._devices} of num_nodes={self.num_nodes} are to be started as"
                f" {asked} processes, and {type(environment).__name__} has {ranks}; set them to make as many, or let"
                " its creates_processes_externally be True."
            )

    def connect(self, *, sums_in_dram: bool) -> None:
        """Initialize the process group of all ranks; a single process has none.

        Args:
            sums_in_dram: whether gradients may be offloaded to DRAM, so that their norms are summed over the ranks
                there.

        Raises:
            PlanError: a process group of another world size is initialized already.
        """
        self._sums_in_dram = sums_in_dram
        self.set_world_ranks()
        if not self.has_peers:
            if dist.is_initialized() and comm.world_size() not in {1, *_asked_before}:
                rank_zero_warn(
                    f"torch.distributed connects {comm.world_size()} processes and the Trainer trains in this one"
                    " alone; give it the cluster environment that started them, as in"
                    " plugins=[RayLightningEnvironment()], or as many devices."
                )
            self._exits.callback(compat.set_rank_zero, compat.set_rank_zero(0))
            return
        strategy = self._strategy
        reset_seed()
        self.backend = self.backend or self._default_backend
        connect(strategy.cluster_environment, self.backend, strategy.root_device, self._timeout)
        if comm.world_size() != self.world_size:
            raise PlanError(
                f"{type(strategy.cluster_environment).__name__} has {self.world_size} processes and torch.distributed"
                f" connects {comm.world_size()}; destroy that process group before the Trainer is run, or make"
                " it of as many."
            )
        self._count_nodes()
        watch_peers(strategy)

    @property
    def _default_backend(self) -> str:
        """Default backend of the root device, and of the CPU if tensors in DRAM may have to be reduced."""
        if self._strategy.root_device.type == "cpu":
            return "gloo"
        return "cpu:gloo,cuda:nccl" if self._sums_in_dram else "nccl"

    def _count_nodes(self) -> None:
        """Count the ranks per node; for nodes of different sizes, use the greatest common divisor of the sizes."""
        if self._environment_ranks is None:
            _asked_before.add(self.world_size)
            return
        nodes = comm.all_gather_object(self._strategy.node_rank)
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
        self._exits.callback(end_groups)
        # Lightning takes any process group for one of several processes.
        self._exits.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\(.*sync_dist=True")


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
