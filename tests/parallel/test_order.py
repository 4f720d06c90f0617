"""Full tensors of what is divided, and back, on meshes of one and two dimensions."""

import pytest
import torch
from ranks import mesh_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_largescale.parallel.order import as_ordered, divided, divided_dims, full, order_of
from lightning_largescale.parallel.tensor import divide_over
from lightning_largescale.workload.parts import Part


def there_and_back(shape, rows, pieces, dim):
    """A linear layer divided by tensor parallelism, and by FSDP2 where the mesh has two dimensions, as one tensor."""
    mesh = mesh_of(shape)
    module = nn.Sequential(nn.Linear(rows, rows, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(rows * rows).view(rows, rows))
    whole, part = module[0].weight.detach().clone(), Part(dim, pieces)
    divide_over(module, {"0.weight": part}, mesh["tp"] if len(shape) > 1 else mesh)
    if len(shape) > 1:
        fully_shard(module, mesh=mesh["dp_shard"])
        as_ordered(module[0].weight, part)
    parameter = module[0].weight
    again = divided(whole, parameter, order_of(parameter))
    return (
        torch.equal(full(parameter, order_of(parameter)), whole),
        torch.equal(again.to_local(), parameter.to_local()),
        divided_dims(parameter),
    )


CASES = [(8, (8,), 0), (8, (8,), 1), (7, (7,), 0), (12, (4, 4, 4), 0), (12, (4, 8), 0), (12, (4, 4, 4), 1)]


@pytest.mark.parametrize(("rows", "pieces", "dim"), CASES)
def test_full_and_divided(two, four, rows, pieces, dim):
    assert two.run(there_and_back, (2,), rows, pieces, dim) == [(True, True, [dim])] * 2
    assert four.run(there_and_back, (2, 2), rows, pieces, dim) == [(True, True, [0, dim])] * 4
    assert four.run(there_and_back, (1, 4), rows, pieces, dim) == [(True, True, [0, dim])] * 4


def replicas(value):
    mesh = mesh_of((2,))
    return full(DTensor.from_local(torch.tensor(value), mesh, [Replicate()], run_check=False)).tolist()


def test_what_is_not_divided(two):
    assert two.run(replicas, [1.0, 2.0]) == [[1.0, 2.0]] * 2


def test_an_order_only_where_there_are_stretches():
    parameter = nn.Parameter(torch.ones(4))
    assert order_of(as_ordered(parameter, Part(0, (4,)))) is None
    assert order_of(as_ordered(parameter, Part(0, (2, 2)))) == Part(0, (2, 2))


def small(rows):
    """The state of a parameter in another order that has fewer dimensions is in none."""
    mesh = mesh_of((2,))
    state = DTensor.from_local(torch.ones(rows // 2), mesh, [Shard(0)], run_check=False)
    return full(state, Part(1, (2, 2))).tolist()


def test_state_of_fewer_dimensions(two):
    assert two.run(small, 4) == [[1.0] * 4] * 2
