"""Equal batches and equal random numbers on the tensor-parallel ranks, which compute shards of the same samples.

With different batches, they would train on neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_largescale import comm
from lightning_largescale.errors import PlanError
from lightning_largescale.workload.batch import digest_of
from lightning_largescale.workload.keep import random_state, set_random_state


def check_equal_batch(batch: Any, mesh: DeviceMesh) -> None:
    """Check that the ranks of the one-dimensional `mesh` have the same batch; a collective.

    Raises:
        PlanError: on all of these ranks, if their batches differ.
    """
    own = digest_of(batch)
    digests = comm.all_gather_object(own, mesh.get_group())
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        ranks = mesh.mesh.tolist()
        raise PlanError(
            f"ranks {ranks[0]} and {ranks[others[0]]} were given different batches and tp={mesh.size()} has them"
            " compute the same samples; use a DistributedSampler made with `trainer.distributed_sampler_kwargs`, and"
            " seed_everything for what is random in the loader."
        )


def equal_random_state(mesh: DeviceMesh, device: torch.device, data_rank: int) -> None:
    """Give the ranks of the one-dimensional `mesh` one random state, which differs between data-parallel ranks.

    A collective of all ranks. The ranks of the first samples keep the random state of their first rank.

    Args:
        mesh: the ranks that compute the same samples.
        device: this rank's device.
        data_rank: the data-parallel rank.
    """
    source = dist.get_global_rank(mesh.get_group(), 0)
    set_random_state(comm.broadcast_object(random_state(), source, mesh.get_group(), device))
    if device.type == "cuda":
        # `random_state` has the states of devices by index, and each rank uses another device.
        of_device = comm.broadcast_object(torch.cuda.get_rng_state(device), source, mesh.get_group(), device)
        torch.cuda.set_rng_state(of_device, device)
    first = comm.broadcast_object(torch.get_rng_state(), device=device)
    if data_rank and torch.equal(first, torch.get_rng_state()):
        torch.manual_seed(torch.initial_seed() + data_rank)
