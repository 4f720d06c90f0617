import contextlib
import os
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from ranks import divided_by_two, in_own_group, mesh_of, run_connected
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from lightning_largescale import compat, groups


def gathers_seen():
    module, seen = divided_by_two(), []
    undo = compat.around_gathers(module[0], lambda: seen.append("before"), lambda: seen.append("after"))
    x = torch.ones(2, 4, requires_grad=True)
    module(x).sum().backward()
    passes = list(seen)
    module[0].unshard()
    module[0].unshard()
    module[0].reshard()
    by_hand = seen[len(passes) :]
    undo()
    module(x).sum().backward()
    return passes, by_hand, len(seen) - len(passes) - len(by_hand)


def test_around_gathers(two):
    assert two.run(gathers_seen) == [(["before", "after"] * 2, ["before", "after"], 0)] * 2


def shards_brought(size):
    """What a module computes whose shards are brought as zeros, when FSDP2 reads them, and without that."""
    mesh = mesh_of((size,))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for part in (*module, module):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    seen = []

    @contextlib.contextmanager
    def bring(shards):
        seen.append([one.numel() for one in shards])
        yield [torch.zeros_like(one) for one in shards]
        seen.append("read")

    before = module(torch.ones(2, 4))
    undo = compat.around_gathers(module[1], lambda: seen.append("before"), lambda: seen.append("after"), bring)
    # As those who are around gathers and gather the group themselves.
    again = compat.around_gathers(module[1], lambda: None, lambda: None, bring)
    zeros = module(torch.ones(2, 4))
    again()
    undo()
    return seen, not zeros.any(), torch.equal(module(torch.ones(2, 4)), before)


@pytest.mark.parametrize("size", [1, 2])
def test_around_gathers_that_bring_shards(two, size):
    elements = [16 // size, 4 // size]
    order = ["before", elements, "read", "after"]
    if size == 2:
        assert two.run(shards_brought, 2) == [(order, True, True)] * 2
    else:
        assert run_connected(1, shards_brought, 1) == [(order, True, True)]


def reductions_seen(hooked):
    """What is told of gradients of two backwards, of which the second adds; and whether they were waited for."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    groups.connect(TorchElasticEnvironment(), "cpu:gloo,cuda:nccl", device, timedelta(seconds=60))
    mesh = init_device_mesh("cuda", (2,))
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for part in (*module, module):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    names = {parameter: name for name, parameter in module.named_parameters()}
    seen, hooks = [], []
    if hooked:
        module[1].weight.register_post_accumulate_grad_hook(lambda one: hooks.append(float(one.grad.to_local().sum())))

    def reduced(parameters, wait):
        wait()
        seen.append({names[one]: float(one.grad.to_local().sum()) for one in parameters})

    undo = compat.around_reductions(module[1], reduced)
    x = torch.ones(8, 64, device=device)
    for _ in range(2):
        module(x).sum().backward()
    undo()
    module(x).sum().backward()
    return seen, hooks, float(module[1].weight.grad.to_local().sum())


@pytest.mark.gpu
@pytest.mark.parametrize("hooked", [False, True])
def test_around_reductions(two, hooked):
    for seen, hooks, last in two.run(in_own_group, reductions_seen, hooked):
        assert [[*one] for one in seen] == [["1.weight", "1.bias"]] * 2
        first, second = (one["1.weight"] for one in seen)
        assert (second, last) == (pytest.approx(2 * first), pytest.approx(3 * first))
        assert hooks == ([pytest.approx(first), pytest.approx(second), pytest.approx(last)] if hooked else [])


def collectives_intercepted():
    """Two linear layers, of which this rank runs one and rank 1 the other; what each entered, and the gradients."""
    module, seen = divided_by_two(), []
    compat.become_root(module)
    groups = [compat.GroupCollectives(part) for part in module]
    own = dist.get_rank()

    def unshard(index, issue):
        seen.append(("unshard", index))
        for joined, group in enumerate(groups):
            issue() if joined == index else group.join_unshard()

    def reduce(index, issue):
        seen.append(("reduce", index, groups[index].unreduced(), groups[index].reduces))
        groups[index].keep_unreduced()

    def end():
        seen.append(("end", [group.is_through_backward for group in groups]))
        for group in groups:
            seen.append(group.reduce((0, 1), own=True))

    undo = [group.intercept(partial(unshard, index), partial(reduce, index)) for index, group in enumerate(groups)]
    undo.append(compat.before_backward_ends(module, end))
    module[own](torch.ones(2, 4 + own, requires_grad=True)).sum().backward()
    gradients = [parameter.grad.full_tensor().mean().item() for parameter in module.parameters()]
    groups[own].drop_gradient(0)
    dropped = next(module[own].parameters()).grad
    for one in undo:
        one()
    module.zero_grad()
    module(torch.ones(2, 4, requires_grad=True)).sum().backward()
    return seen, gradients, dropped, [group.parameters for group in groups], compat.has_group(module)


def test_group_collectives_and_before_backward_ends_and_has_group(two):
    for own, (seen, gradients, dropped, parameters, root_has_some) in enumerate(two.run(collectives_intercepted)):
        other = 1 - own
        assert seen == [
            *[("unshard", own)] * 2,
            ("reduce", own, (0, 1), True),
            ("end", [own == 0, own == 1]),
            *[([0, 1], [0, 1] if index == own else []) for index in range(2)],
            # As FSDP ends a backward that has not come past a group.
            ("reduce", other, (), True),
        ]
        # Two samples of ones, and zeros from the rank that has not run the layer.
        assert gradients == [1.0] * 4
        assert dropped is None
        assert parameters == [2, 2]
        assert not root_has_some


def looked_at_by_groups():
    """A group as it is gathered, written into, reduced and resharded."""
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    rank = dist.get_rank()
    block = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        block.weight.copy_(torch.arange(9.0).view(3, 3))
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    compat.become_root(block)
    (one,) = compat.grouped_parameters(block)
    assert isinstance(one, compat.GroupedParameter)
    assert (one.name, one.leaf, one.is_gathered, one.is_pinned) == ("weight", None, False, False)
    seen = []

    @contextlib.contextmanager
    def told(word):
        seen.append(word)
        yield
        seen.append(word)

    undo = compat.around_sharding(
        block,
        gathered=lambda: told("gathers"),
        resharding=lambda: seen.append("reshards"),
        reducing=lambda: told("reduces"),
    )
    block.unshard()
    version = compat.version(one.leaf)
    one.set_values(one.values * 2)
    assert compat.version(one.leaf) == version
    assert block.weight is one.leaf
    assert one.is_gathered
    assert not one.is_cast
    assert torch.equal(one.leaf, torch.arange(9.0).view(3, 3) * 2)
    assert torch.equal(one.own_memory, one.memory * 2)
    assert one.gathered_memory.numel() == 2 * one.memory.numel()
    assert one.places == [(block, "weight")]
    one.leaf.grad = torch.full((3, 3), float(rank))
    compat.reduce_gradients(block)
    assert seen == ["gathers", "gathers", "reduces", "reshards", "reduces"]
    undo()
    assert block.weight is one.shard
    assert compat.version(compat.local_tensor(one.shard)) >= 0
    block.unshard()
    return seen[5:], one.shard.grad.full_tensor().unique().tolist()


def test_grouped_parameters_around_sharding_and_reduce_gradients(two):
    assert two.run(looked_at_by_groups) == [([], [0.5])] * 2
