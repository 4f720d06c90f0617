import dataclasses
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from ranks import run_connected
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import _common_utils, fully_shard
from torch.distributed.tensor import DTensor

from lightning_largescale import compat


def roots():
    inner = nn.Linear(2, 2)
    module = nn.Sequential(inner, nn.Linear(2, 2))
    mesh = init_device_mesh("cpu", (1,))
    for one in (inner, module):
        fully_shard(one, mesh=mesh)
    compat.become_root(module)
    states = [fully_shard.state(one) for one in (module, inner)]
    before = [state._is_root for state in states]
    module(torch.ones(1, 2)).sum().backward()
    return before, inner.weight.grad is not None


def test_become_root():
    assert run_connected(1, roots) == [([True, False], True)]


def test_sharding_attributes():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        layer = nn.Linear(2, 2)
        before = {*vars(layer)}
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert {*vars(layer)} - before == compat.sharding_attributes()
    finally:
        dist.destroy_process_group()


def divided_and_undone():
    dist.is_initialized() or dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = []
    module[0].register_forward_hook(lambda *_: kept.append("user"))
    before = [{key: value for key, value in vars(part).items() if "hooks" not in key} for part in module.modules()]
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    module(torch.ones(2, 4)).sum().backward()
    with torch.no_grad(), compat.without_gathering(module[0]):
        shard = module[0].weight.to_local()
        assert module[0].weight.shape == (4, 4)
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            module[0](torch.ones(2, 4))
        assert shard.shape == (2, 4)
    with torch.no_grad():
        module(torch.ones(2, 4))
    compat.undo_sharding(module)
    compat.undo_sharding(module[0])
    hooks = [len(part._forward_pre_hooks) + len(part._state_dict_pre_hooks) for part in module.modules()]
    after = [{key: value for key, value in vars(part).items() if "hooks" not in key} for part in module.modules()]
    return type(module), kept, hooks, [[*part] for part in before] == [[*part] for part in after]


def test_undo_sharding_and_without_gathering():
    for kind, kept, hooks, same in run_connected(2, divided_and_undone):
        assert kind is nn.Sequential
        assert kept == ["user"] * 2
        assert hooks == [0, 0, 0]
        assert same


def fail(*_):
    raise ZeroDivisionError


def half_a_step():
    """Whether a step after one that ended in the midst of its backward has the gradients of the one before."""
    torch.manual_seed(0)
    environment = TorchElasticEnvironment()
    compat.init_process_group(environment, "gloo", torch.device("cpu"), timedelta(seconds=60))
    root = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for part in (*root, root):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))

    def gradients():
        root.zero_grad()
        root(torch.ones(2, 4)).sum().backward()
        return [parameter.grad.full_tensor() for parameter in root.parameters()]

    before = gradients()
    handle = root[1].register_full_backward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        gradients()
    handle.remove()
    compat.forget_sharded_step(root)
    return all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


def test_forget_sharded_step(two):
    assert two.run(half_a_step) == [True, True]


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: torch.Tensor


class InFrozen(nn.Linear):
    def forward(self, x):
        return Frozen(super().forward(x))


def backward_of_frozen():
    """Also as with a torch that does not look into dataclasses."""
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    gradients = []
    for known in (True, False):
        block = fully_shard(InFrozen(4, 4), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
        output = block(torch.ones(1, 4))
        with pytest.MonkeyPatch.context() as patch:
            if not known:
                patch.delattr(_common_utils, "collect_grad_tensors", raising=False)
            compat.gather_for_backward_of(block, [output.value])
        output.value.sum().backward()
        gradients.append(block.weight.grad.full_tensor())
    return torch.equal(*gradients)


def test_gather_for_backward_of(two):
    assert two.run(backward_of_frozen) == [True, True]


def hooks_of_a_sharded_module():
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    block = nn.Linear(4, 4)
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    given = []
    with pytest.MonkeyPatch.context() as patch:
        register = torch.Tensor.register_hook
        patch.setattr(
            torch.Tensor, "register_hook", lambda tensor, hook: (given.append(hook), register(tensor, hook))[1]
        )
        output = block(torch.ones(2, 4))
        output.register_hook(lambda gradient: gradient)
    return [compat.is_of_sharding(hook) for hook in given]


def test_is_of_sharding(two):
    assert two.run(hooks_of_a_sharded_module) == [[True, False]] * 2


def shards_and_gathered():
    module = nn.Linear(2, 2)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    module.unshard()
    gathered = module.weight
    with compat.sharded_in_place(module):
        shard = module.weight
    return isinstance(gathered, DTensor), isinstance(shard, DTensor), module.weight is gathered


def test_sharded_in_place():
    assert run_connected(1, shards_and_gathered) == [(False, True, True)]


def test_is_of_group():
    assert not compat.is_of_group(sys._getframe())
