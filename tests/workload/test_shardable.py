"""What tensor parallelism divides, found without any ranks."""

import pytest
import torch
from ranks import quiet
from torch._subclasses.fake_tensor import FakeTensorMode
from workload.tensor_blocks import KNOWN, UNSAFE, UNUSUAL, GPTBlock, called

from lightning_largescale.workload.shardable import divide

pytestmark = quiet


def found(case, ranks):
    block, args, kwargs = called(case)
    return block, divide(block, args, kwargs, ranks)


def share(block, divided):
    """Of the elements of matrices, those that are divided."""
    matrices = {name: parameter.numel() for name, parameter in block.named_parameters() if parameter.dim() > 1}
    return sum(size for name, size in matrices.items() if name in divided.parts) / sum(matrices.values())


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", KNOWN)
def test_every_matrix_of_a_block_of_known_models(name, ranks):
    block, divided = found(name, ranks)
    few_heads = ranks == 4 and name in ("llama", "mistral", "qwen3")
    if few_heads:
        assert {one.split(".")[1] for one in divided.whole} == {"k_proj", "v_proj"}
    elif name not in ("scored", "t5 encoder", "t5 decoder"):
        assert share(block, divided) == 1
        assert divided.whole == {}
    assert share(block, divided) > 0.3
    for matrix, part in divided.parts.items():
        if matrix.endswith(
            ("down_proj.weight", "down.weight", "o_proj.weight", ".o.weight", "wo.weight", "fc2.weight")
        ):
            assert part.dim == 1, matrix
        if matrix.endswith("bias"):
            assert part.dim == 0
            assert divided.parts[matrix.removesuffix("bias") + "weight"].pieces == part.pieces


@pytest.mark.parametrize("name", ["gpt2", "torch"])
def test_q_k_and_v_of_one_matrix_are_three_stretches(name):
    _, divided = found(name, 2)
    assert {part.pieces for part in divided.parts.values() if len(part.pieces) > 1} == {(32, 32, 32)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_divided(name, ranks):
    assert found(name, ranks)[1].parts


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", UNSAFE)
def test_what_cannot_be_proven_stays_whole(name, ranks):
    block, divided = found(name, ranks)
    if name == "an odd number of heads":
        assert {matrix for matrix in divided.parts if matrix.endswith("weight")} == {"up.weight", "down.weight"}
        return
    assert not divided.parts
    assert set(divided.whole) == {name for name, parameter in block.named_parameters() if parameter.dim() > 1}


def test_what_others_use_too_stays_whole():
    block, args, kwargs = called("gpt")
    divided = divide(block, args, kwargs, 2, shared=["up.weight"])
    assert {"up.weight", "down.weight"} <= divided.whole.keys()
    assert divided.whole["up.weight"] == "it is used outside of the block as well"


def test_nothing_is_allocated():
    with FakeTensorMode():
        block, x = GPTBlock(), torch.empty(2, 8, 32, requires_grad=True)
    assert len(divide(block, [x], {}, 2).parts) == 6 + 4
