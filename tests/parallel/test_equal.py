"""Equal weights: rank 0's, of every size, shape, layout and dtype."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from lightning_largescale.parallel import equal


def mixed(bucket_bytes):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    equal._BUCKET_BYTES = bucket_bytes
    rank = dist.get_rank()
    tensors = [
        torch.full((3, 5), float(rank)),
        nn.Parameter(torch.full((40, 20), float(rank))),
        torch.full((4, 6), rank).t(),
        torch.tensor(rank),
        torch.empty(0),
        torch.full((7,), bool(rank)),
        torch.full((2, 2), float(rank), dtype=torch.bfloat16),
    ]
    equal.equal_weights(tensors)
    return [bool((tensor == 0).all()) for tensor in tensors]


def test_rank_zeros_values_everywhere(two):
    for bytes_together in (1, 100, 2**24):
        assert two.run(mixed, bytes_together) == [[True] * 7] * 2
