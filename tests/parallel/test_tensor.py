"""Tensor parallelism of single blocks: what a plain run computes, forward and backward, each rank with its part."""

from pathlib import Path

import pytest
import torch
from ranks import mesh_of, quiet
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from workload.tensor_blocks import KNOWN, UNSAFE, UNUSUAL, called

from lightning_largescale.parallel.order import full, order_of
from lightning_largescale.parallel.tensor import compute_on_parts, divide_over
from lightning_largescale.workload.parts import Part
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
    mesh = mesh_of()
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


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "torch",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("gpt", "bert", "gpt2", "halves of one matrix")),
    ],
)
def test_blocks_on_four_ranks(four, case):
    assert set(four.run(divided_and_trained, case, 4)) != {0}


class Hooked(nn.Module):
    """A block that notes, and halves, the gradient of what lies between its matrices."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        hidden = self.up(x)
        hidden.register_hook(self.note)
        return self.down(torch.relu(hidden))

    def note(self, gradient):
        self.noted = gradient.clone()
        return gradient / 2


def hooked():
    x = torch.ones(3, 8, requires_grad=True)
    plain = Hooked()
    plain(x).square().sum().backward()
    block, mesh = Hooked(), mesh_of()
    found = divide(block, (x.detach(),), {}, 2)
    assert len(found.parts) == 3
    compute_on_parts(block, found.parts, mesh)
    divide_over(block, found.parts, mesh)
    again = torch.ones(3, 8, requires_grad=True)
    block(again).square().sum().backward()
    torch.testing.assert_close(block.noted, plain.noted)
    torch.testing.assert_close(again.grad, x.grad)


def test_hooks_are_given_whole_gradients(two):
    two.run(hooked)


class Collectives(TorchDispatchMode):
    """Counts them, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def communicated(case):
    """The collectives of a forward and a backward."""
    mesh = mesh_of()
    block, args, kwargs = built(case)
    parts = divide(block, args, kwargs, mesh.size()).parts
    compute_on_parts(block, parts, mesh)
    divide_over(block, parts, mesh)
    with Collectives() as forward:
        output = block(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    with Collectives() as backward:
        output.square().mean().backward()
    return forward.names, backward.names


@pytest.mark.parametrize("case", ["gpt", "llama", "bert", "gpt2", "opt", "vit"])
def test_blocks_communicate_no_more_than_those_divided_by_hand(two, case):
    # Megatron-LM (Shoeybi et al. 2019, section 3): attention and MLP sum once in forward and once in backward.
    assert two.run(communicated, case) == [(["allreduce_"] * 2,) * 2] * 2


class Classes(nn.Module):
    """A table and a head of an odd number of entries, and the losses of a vocabulary."""

    def __init__(self, size=11):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(size, 4, padding_idx=3), nn.Linear(4, size)

    def forward(self, tokens, **options):
        logits = self.head(self.table(tokens))
        hidden = (
            logits.masked_fill(torch.arange(logits.shape[-1]) == 2, -torch.inf) if options.pop("hide", 0) else logits
        )
        return F.cross_entropy(hidden.flatten(0, 1), options.pop("targets", tokens).flatten(), **options)


LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 5},
    "minus infinity": {"hide": True},
    "weighted": {"weight": torch.arange(1.0, 12.0)},
}


def vocabulary(options):
    """Losses and gradients, plain and divided."""
    mesh = mesh_of()
    tokens = torch.tensor([[0, 1, 5, 3], [10, 6, 7, 9]])
    plain, divided = Classes(), Classes()
    parts = {"table.weight": Part(0, (11,)), "head.weight": Part(0, (11,)), "head.bias": Part(0, (11,))}
    compute_on_parts(divided, parts, mesh)
    divide_over(divided, parts, mesh)
    found = []
    for module in (plain, divided):
        loss = module(tokens, **options)
        loss.sum().backward()
        gradients = [one.grad for one in module.parameters()]
        found.append([loss.detach(), *(full(one) if isinstance(one, DTensor) else one for one in gradients)])
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_vocabularies_that_are_uneven(two, four, name):
    for expected, found in [*two.run(vocabulary, LOSSES[name]), *four.run(vocabulary, LOSSES[name])]:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def out_of_range(token, targets):
    mesh = mesh_of()
    module = Classes()
    parts = {"table.weight": Part(0, (11,)), "head.weight": Part(0, (11,)), "head.bias": Part(0, (11,))}
    compute_on_parts(module, parts, mesh)
    divide_over(module, parts, mesh)
    try:
        module(torch.tensor([[0, token]]), targets=torch.tensor(targets))
    except IndexError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("token", "targets"), [(11, [0, 0]), (-1, [0, 0]), (0, [0, 11]), (0, [-1, 0])])
def test_tokens_that_are_no_entries(two, token, targets):
    assert None not in two.run(out_of_range, token, targets)


ON_A_DEVICE = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from torch.distributed.device_mesh import init_device_mesh
from workload.tensor_blocks import called
from lightning_largescale.parallel.order import full, order_of
from lightning_largescale.parallel.tensor import compute_on_parts, divide_over
from lightning_largescale.workload.batch import map_tensors
from lightning_largescale.workload.shardable import divide

device = torch.device({device!r})
store = dist.TCPStore("localhost", 0, 1, True)
dist.init_process_group({backend!r}, store=store, rank=0, world_size=1)
mesh = init_device_mesh(device.type, (1,))

def trained(divided):
    torch.manual_seed(0)
    block, args, kwargs = called({case!r})
    parts = divide(block, args, kwargs, 2).parts
    block.to(device).eval()
    if divided:
        compute_on_parts(block, parts, mesh)
        divide_over(block, parts, mesh)
    args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.detach().to(device))
    output = block(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    output.square().mean().backward()
    whole = [full(one.grad, order_of(one)) if divided and name in parts else one.grad
             for name, one in block.named_parameters()]
    return [output.detach(), *whole]

for one, other in zip(trained(True), trained(False), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
print("alike")
"""
_ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("case", ["llama", *(pytest.param(case, marks=pytest.mark.slow) for case in ("gpt2", "torch"))])
@pytest.mark.parametrize(
    ("device", "backend"),
    [pytest.param("cpu", "gloo", marks=pytest.mark.slow), pytest.param("cuda", "nccl", marks=_ON_CUDA)],
)
def test_a_single_rank_on_its_device(run_python, device, backend, case):
    """The kernels of the device, by the rules of two ranks."""
    tests = str(Path(__file__).parents[1])
    assert "alike" in run_python(ON_A_DEVICE.format(tests=tests, device=device, backend=backend, case=case))
