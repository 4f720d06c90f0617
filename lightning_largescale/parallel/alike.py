"""What the ranks of tensor parallelism must have alike: their batches, and their random numbers.

They compute parts of the same samples, so a loader that gives them different ones would train on neither.
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
    """Make sure that the ranks of `mesh`, of one dimension, have the same batch: a collective.

    Raises:
        PlanError: on all of them, where they have not.
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
    """Let the ranks of `mesh`, of one dimension, draw the same random numbers, others than those of other data do.

    A collective of all ranks. Those that see the first samples go on with what their first rank has.

    Args:
        mesh: of the ranks that compute the same samples.
        device: of this rank.
        data_rank: number of the samples that this rank sees among those of all ranks.
    """
    source = dist.get_global_rank(mesh.get_group(), 0)
    set_random_state(comm.broadcast_object(random_state(), source, mesh.get_group(), device))
    if device.type == "cuda":
        # Each rank's own device, which is another one.
        of_device = comm.broadcast_object(torch.cuda.get_rng_state(device), source, mesh.get_group(), device)
        torch.cuda.set_rng_state(of_device, device)
    first = comm.broadcast_object(torch.get_rng_state(), device=device)
    if data_rank and torch.equal(first, torch.get_rng_state()):
        torch.manual_seed(torch.initial_seed() + data_rank)
