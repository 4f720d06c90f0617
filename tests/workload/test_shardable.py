"""What tensor parallelism divides, found on a fake process group."""

import pytest
import torch
import torch.distributed as dist
from ranks import quiet
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from workload.tensor_blocks import IN_PART, KNOWN, TAKES_HEADS, UNSAFE, GPTBlock, called

from lightning_largescale.workload.shardable import divide

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*random operators:UserWarning")]


@pytest.fixture(params=[2, 4])
def mesh(request):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield init_device_mesh("cpu", (request.param,))
    dist.destroy_process_group()


def found(case, mesh):
    block, args, kwargs = called(case)
    return block, divide(block, args, kwargs, mesh)


def share(block, divided):
    """Of the elements of matrices, those that are divided."""
    matrices = {name: parameter.numel() for name, parameter in block.named_parameters() if parameter.dim() > 1}
    return sum(size for name, size in matrices.items() if name in divided.dims) / sum(matrices.values())


HEADS_BY_HAND = ("scored", "bert", "t5 encoder", "t5 decoder")


@pytest.mark.parametrize("name", KNOWN)
def test_every_matrix_of_a_block_of_known_models(mesh, name):
    if name in HEADS_BY_HAND and not TAKES_HEADS:
        pytest.skip("by hand, and this torch does not take it divided")
    block, divided = found(name, mesh)
    few_heads = mesh.size() == 4 and name in ("llama", "mistral", "qwen3")
    if name not in ("scored", "t5 encoder", "t5 decoder") and not few_heads:
        assert share(block, divided) == 1
        assert divided.whole == {}
    assert {"attention.self.query.weight", "q.weight"} & divided.dims.keys() or share(block, divided) > 0.5
    for matrix, dim in divided.dims.items():
        if matrix.endswith(
            ("down_proj.weight", "down.weight", "o_proj.weight", ".o.weight", "wo.weight", "fc2.weight")
        ):
            assert dim == 1, matrix
        if matrix.endswith("bias"):
            assert dim == 0
            assert divided.dims[matrix.removesuffix("bias") + "weight"] == 0


@pytest.mark.parametrize("name", IN_PART)
def test_what_has_one_matrix_for_q_k_and_v(mesh, name):
    block, divided = found(name, mesh)
    assert 0.5 <= share(block, divided) < 1
    assert all(divided.whole.values())


@pytest.mark.parametrize("name", UNSAFE)
def test_what_cannot_be_proven_stays_whole(mesh, name):
    block, divided = found(name, mesh)
    if name == "an odd number of heads":
        assert {matrix for matrix in divided.dims if matrix.endswith("weight")} == {"up.weight", "down.weight"}
        return
    assert not divided.dims
    assert set(divided.whole) == {name for name, parameter in block.named_parameters() if parameter.dim() > 1}


def test_nothing_is_allocated(mesh):
    with FakeTensorMode():
        block, x = GPTBlock(), torch.empty(2, 8, 32, requires_grad=True)
        assert len(divide(block, [x], {}, mesh).dims) == 6 + 4
