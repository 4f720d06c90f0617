"""What ranks of tensor parallelism say to one another, and its gradients."""

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of
from torch.distributed.tensor import DTensor
from workload.tensor_blocks import called

from lightning_largescale.parallel.order import full, order_of
from lightning_largescale.parallel.tensor import compute_on_parts, divide_over
from lightning_largescale.parallel.tensor_ranks import MeshRanks
from lightning_largescale.workload.parts import Part
from lightning_largescale.workload.shardable import divide


def communicated():
    """Each operation's result, and the gradient of its input where each rank's result is weighed by its rank + 1."""
    ranks, found = MeshRanks(mesh_of()), {}
    part, uneven = Part(1, (4,)), Part(1, (3,))
    weight = ranks.rank + 1.0
    operations = {
        "enter": (lambda x: ranks.enter(x), torch.ones(1, 4)),
        "reduce": (lambda x: ranks.reduce(x * 1), torch.full((1, 4), weight)),
        "gather": (lambda x: ranks.gather(x, part), torch.full((1, 2), weight)),
        "uneven gather": (lambda x: ranks.gather(x, uneven), torch.full((1, 2 - ranks.rank), weight)),
        "gather entering": (lambda x: ranks.gather_entering(x, part), torch.full((1, 2), weight)),
        "reduce to part": (lambda x: ranks.reduce_to_part(x, part), torch.full((1, 4), weight)),
        "own": (lambda x: ranks.own(x, part), torch.arange(4.0).view(1, 4)),
    }
    for name, (operation, given) in operations.items():
        x = given.requires_grad_()
        result = operation(x)
        (result * weight).sum().backward()
        found[name] = result.flatten().tolist(), x.grad.flatten().tolist()
    return found


def test_each_operation_and_its_gradient(two):
    first, second = two.run(communicated)
    assert first["enter"] == second["enter"] == ([1.0] * 4, [3.0] * 4)
    # The gradient is each rank's own: it is the same on all, in a computation that is the same on all.
    assert first["reduce"] == ([3.0] * 4, [1.0] * 4)
    assert second["reduce"] == ([3.0] * 4, [2.0] * 4)
    assert first["gather"] == ([1.0, 1.0, 2.0, 2.0], [1.0, 1.0])
    assert second["gather"] == ([1.0, 1.0, 2.0, 2.0], [2.0, 2.0])
    assert first["uneven gather"] == ([1.0, 1.0, 2.0], [1.0, 1.0])
    assert second["uneven gather"] == ([1.0, 1.0, 2.0], [2.0])
    assert first["gather entering"] == ([1.0, 1.0, 2.0, 2.0], [3.0, 3.0])
    assert first["reduce to part"] == second["reduce to part"] == ([3.0, 3.0], [1.0, 1.0, 2.0, 2.0])
    assert first["own"] == ([0.0, 1.0], [1.0, 1.0, 2.0, 2.0])
    assert second["own"] == ([2.0, 3.0], [1.0, 1.0, 2.0, 2.0])


def drawn():
    ranks = MeshRanks(mesh_of())
    torch.manual_seed(3)
    with ranks.own_random(torch.device("cpu")):
        own = torch.rand(4).tolist()
    return own, torch.rand(4).tolist()


def test_random_numbers_of_parts_differ_and_go_on_alike(two):
    (own, after), (other, other_after) = two.run(drawn)
    assert own != other
    assert after == other_after


def penalised(case):
    """Gradients of a penalty on the gradient of the input: plain, and divided."""
    found = []
    for parts in (False, True):
        torch.manual_seed(0)
        block, args, kwargs = called(case)
        if parts:
            divided = divide(block, args, kwargs, dist.get_world_size() if dist.is_initialized() else 2).parts
            compute_on_parts(block, divided, mesh_of())
            divide_over(block, divided, mesh_of())
        loss = block(*args, **kwargs).square().mean()
        [gradient] = torch.autograd.grad(loss, args[0], create_graph=True)
        (loss + gradient.square().sum()).backward()
        found.append(
            [
                full(one.grad, order_of(one)) if isinstance(one, DTensor) else one.grad
                for one in block.parameters()
                if one.grad is not None
            ]
        )
    return found


@pytest.mark.parametrize("case", ["scored", "a residual inside the pair", "halves of one matrix"])
def test_gradients_of_gradients(two, case):
    for expected, found in two.run(penalised, case):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
