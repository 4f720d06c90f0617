import torch
from ranks import mesh_of
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_largescale.dtensors import local_of


def own_rows():
    sharded = distribute_tensor(torch.arange(4.0), mesh_of(), [Shard(0)])
    local_of(sharded).mul_(2)
    return local_of(sharded).tolist()


def test_the_local_shard_shares_the_memory_of_its_tensor(two):
    assert two.run(own_rows) == [[0.0, 2.0], [4.0, 6.0]]


def test_a_plain_tensor_is_its_own_shard():
    tensor = torch.ones(2)
    assert local_of(tensor) is tensor
