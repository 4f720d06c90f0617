"""ConnectedStrategy: the processes of a run and what they say to one another; no model."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_largescale import compat
from lightning_largescale.groups import end_groups
from lightning_largescale.launch import watch_peers
from lightning_largescale.plan import PlanError

_Value = TypeVar("_Value")


class ConnectedStrategy(ParallelStrategy, ABC):
    """One process a device, connected by torch.distributed; a single process is connected to nothing.

    Args:
        process_group_backend: torch.distributed's name; None takes the device's default.
        timeout: how long a collective may wait for the other ranks.
    """

    def __init__(self, *, process_group_backend: str | None, timeout: timedelta | None) -> None:
        super().__init__()
        self.num_nodes = 1
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        # What teardown takes back.
        self._undo = contextlib.ExitStack()

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The trainer's accelerator: CPU or CUDA."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and not isinstance(accelerator, CPUAccelerator | CUDAAccelerator):
            name = type(accelerator).__name__.removesuffix("Accelerator").lower()
            raise PlanError(
                f"accelerator={name!r} is not one that {type(self).__name__} trains on;"
                " use accelerator='cpu' or 'cuda'."
            )
        self._accelerator = accelerator

    @property
    @override
    def local_rank(self) -> int:
        """Of this process on its node. A Trainer with one device is alone, also in a process that others stand beside:
        a script that trained on several may go on with each by itself.
        """
        return super().local_rank if self.has_peers else 0

    @property
    @override
    def global_rank(self) -> int:
        """Of this process among all."""
        return super().global_rank if self.has_peers else 0

    @property
    @override
    def node_rank(self) -> int:
        """Of this process's node; only asked of the environment where there are other processes."""
        return super().node_rank if self.is_distributed else 0

    @property
    @override
    def world_size(self) -> int:
        """Number of processes."""
        return super().world_size if self.has_peers else 1

    @property
    @override
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self.parallel_devices[self.local_rank] if self.parallel_devices else torch.device("cpu")

    @property
    def num_processes(self) -> int:
        """Number of ranks on this node."""
        return len(self.parallel_devices or ())

    @property
    def is_distributed(self) -> bool:
        """Whether loaders are to be divided among ranks; Lightning asks it also before it lets batch sizes be tried."""
        return self.has_peers and not compat.asked_by_batch_size_finder()

    @property
    def has_peers(self) -> bool:
        """Whether there are other ranks."""
        return self.num_processes * self.num_nodes > 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Arguments of a DistributedSampler: all ranks are data parallel."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """torch.distributed's name of what carries the collectives."""
        return self._process_group_backend

    @property
    def _default_backend(self) -> str:
        """Of the root device, and of DRAM where what is there may have to be summed."""
        if self.root_device.type == "cpu":
            return "gloo"
        return "cpu:gloo,cuda:nccl" if self._sums_in_dram else "nccl"

    @property
    @abstractmethod
    def _sums_in_dram(self) -> bool:
        """Whether gradients may be kept in DRAM, of which norms are summed over the ranks."""

    def set_world_ranks(self) -> None:
        """Tell the cluster environment which of how many ranks this process is.

        A single process tells nobody: it may be one of the ranks of another Trainer, whose fit is under way.
        """
        if not self.is_distributed:
            return
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        compat.set_rank_zero(self.global_rank)

    @override
    def setup_environment(self) -> None:
        """Connect the ranks; a single process connects to nothing."""
        super().setup_environment()
        self.set_world_ranks()
        if self.has_peers:
            reset_seed()
            backend = self._process_group_backend = self._process_group_backend or self._default_backend
            compat.init_process_group(self.cluster_environment, backend, self.root_device, self._timeout)
            watch_peers(self)
        else:
            self._undo.callback(compat.set_rank_zero, compat.set_rank_zero(0))

    def connect_alone(self) -> None:
        """Give a single process a group of its own until teardown, for what only works in one.

        Raises:
            PlanError: it is one of several that are connected already.
        """
        if self.has_peers or (dist.is_initialized() and dist.get_world_size() == 1):
            return
        if dist.is_initialized():
            raise PlanError(
                "offload in a Trainer of one device needs a process group of one, and this process is in one of"
                f" {dist.get_world_size()}; give the Trainer as many devices, or call"
                " torch.distributed.destroy_process_group() first."
            )
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(self._default_backend, store=store, rank=0, world_size=1)
        self._undo.callback(end_groups)
        # Lightning takes any group for one of several processes.
        self._undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\(.*sync_dist=True")

    def _meet_peers(self) -> None:
        """Wait, in a step whose ranks may run different modules, until all are about to enter a collective."""

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here."""
        self._meet_peers()
        if self.has_peers and dist.is_initialized():
            ids = [self.root_device.index] if "nccl" in dist.get_backend() else None
            dist.barrier(device_ids=ids)

    @override
    def broadcast(self, obj: _Value, src: int = 0) -> _Value:
        """What rank `src` gives as `obj`, on every rank."""
        if not (self.has_peers and dist.is_initialized()):
            return obj
        self._meet_peers()
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Every rank's `tensor`, stacked; a single process has its own."""
        self._meet_peers()
        return super().all_gather(tensor, group, sync_grads) if self.has_peers else tensor

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """`tensor` reduced over all ranks; what is no tensor is returned as it is."""
        if not (self.has_peers and isinstance(tensor, Tensor)):
            return tensor
        self._meet_peers()
        return compat.reduce_tensor(tensor, group, reduce_op)
