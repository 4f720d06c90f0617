"""Tensor parallelism of single blocks: what a plain run computes, forward and backward, each rank with its part."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from ranks import quiet
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from workload.tensor_blocks import KNOWN, UNSAFE, UNUSUAL, called

from lightning_largescale import compat
from lightning_largescale.parallel.order import full, order_of
from lightning_largescale.parallel.tensor import compute_on_parts, divide_over
from lightning_largescale.workload.shardable import divide

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*random operators:UserWarning")]


def built(case):
    torch.manual_seed(0)
    block, args, kwargs = called(case)
    return block.eval(), args, kwargs


def trained(block, args, kwargs):
    """The result, the gradient of the input and those of the parameters, whole."""
    output = block(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    whole = {
        name: full(one, order_of(block.get_parameter(name))) if isinstance(one, DTensor) else one
        for name, one in gradients.items()
    }
    return [output.detach(), args[0].grad, *whole.values()]


def divided_and_trained(case, ways):
    if not dist.is_initialized():
        compat.init_process_group(TorchElasticEnvironment(), None, torch.device("cpu"), timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    block, args, kwargs = built(case)
    expected = trained(block, args, kwargs)
    sizes = {name: parameter.numel() for name, parameter in block.named_parameters()}
    names = list(block.state_dict())
    block, args, kwargs = built(case)
    found = divide(block, args, kwargs, ways)
    compute_on_parts(block, found.parts, mesh)
    divide_over(block, found.parts, mesh)
    results = trained(block, args, kwargs)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert list(block.state_dict()) == names
    assert case != "tied matrices" or block.also.weight is block.up.weight
    for name, part in found.parts.items():
        parameter = block.get_parameter(name)
        assert parameter.to_local().shape[part.dim] * ways == parameter.shape[part.dim]
        assert parameter.to_local().numel() * ways == sizes[name]
    return len(found.parts)


@pytest.mark.parametrize("case", [*KNOWN, *UNUSUAL])
def test_blocks_on_two_ranks(two, case):
    counts = two.run(divided_and_trained, case, 2)
    assert counts[0] == counts[1]
    assert counts[0] > 0


@pytest.mark.parametrize("case", UNSAFE)
def test_what_stays_whole_is_right(two, case):
    assert two.run(divided_and_trained, case, 2) == ([3, 3] if case == "an odd number of heads" else [0, 0])


@pytest.mark.parametrize("case", ["gpt", "llama", "bert", "gpt2", "torch", "halves of one matrix"])
def test_blocks_on_four_ranks(four, case):
    assert set(four.run(divided_and_trained, case, 4)) != {0}
