import torch
import torch.distributed as dist
from ranks import divided_by_two, run_connected
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_largescale import compat


def gathered_in_order():
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False))
    before = module[0].weight.detach().clone()
    dist.broadcast(before, 0)
    with torch.no_grad():
        module[0].weight.copy_(before)
    fully_shard(module[0])
    fully_shard(module)
    made = []
    compat.when_gathered(module[0], module[0].weight, made.append, (1, 0))
    seen = []
    module[0].register_forward_pre_hook(lambda part, _: seen.append((part.weight.stride(), part.weight.data.clone())))
    for _ in range(2):
        module(torch.ones(1, 2))
        freed = made[0].untyped_storage().nbytes()
    return [(stride, torch.equal(values, before)) for stride, values in seen], len(made), freed


def test_when_gathered():
    assert run_connected(2, gathered_in_order) == [([((1, 4), True)] * 2, 1, 0)] * 2


def shards_placed():
    module = divided_by_two()
    shards = compat.shards_of(module[0])
    assert [one for one, _ in shards] == [*module[0].parameters()]
    assert compat.shards_of(module) == []
    before = module(torch.ones(2, 4))
    for parameter, data in compat.shards_of(module[0]):
        memory = torch.full_like(data, torch.nan)
        memory.copy_(data)
        compat.place_shard(module[0], parameter, memory)
        data.fill_(torch.nan)
    after = module(torch.ones(2, 4))
    same = [one.to_local().data_ptr() == data.data_ptr() for one, data in compat.shards_of(module[0])]
    return [data.numel() for _, data in shards], len(module[0].weight.to_local()), same, torch.equal(before, after)


def test_shards_of_and_place_shard(two):
    assert two.run(shards_placed) == [([12, 3], 3, [True, True], True), ([12, 3], 2, [True, True], True)]
