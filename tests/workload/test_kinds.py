"""Parameters that have elements in the same memory are found, and what merely shares a storage is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.workload.kinds import check_tensors, why_whole


def module_of(**tensors):
    module = nn.Module()
    for name, one in tensors.items():
        module.register_parameter(name, nn.Parameter(one, requires_grad=False))
    return module


def columns(count):
    return dict(zip(map("p{}".format, range(count)), torch.zeros(3, count).unbind(1), strict=True))


def rows(count):
    return dict(zip(map("p{}".format, range(count)), torch.zeros(count, 3).unbind(0), strict=True))


FLAT = torch.zeros(12)
APART = {
    "rows": rows(5),
    "rows from the last": dict(reversed(rows(5).items())),
    "columns": columns(5),
    "corners of a matrix": {"a": FLAT.view(3, 4)[:2, :2], "b": FLAT.view(3, 4)[1:, 2:]},
    "quarters": dict(
        zip("abcd", (half for part in torch.zeros(4, 4).chunk(2) for half in part.chunk(2, 1)), strict=True)
    ),
    "other dtypes": {"a": FLAT[:2], "b": FLAT[2:].view(torch.float64), "c": torch.zeros(0)},
    "expanded ones": {"a": FLAT[:1].expand(5), "b": FLAT[1:]},
}
SHARED = {
    "one in all": ({"a": FLAT, "b": FLAT[3:5]}, "'a' and 'b'"),
    "all about one": ({"b": FLAT[3:5], "a": FLAT}, "'b' and 'a'"),
    "not the neighbour": ({"a": FLAT[::3], "b": FLAT[1:3], "c": FLAT[3:5]}, "'a' and 'c'"),
    "two of an even number": ({"a": FLAT[1::2], "b": FLAT[::2], "c": FLAT[6::4]}, "'b' and 'c'"),
    "a byte": ({"a": FLAT[:3], "b": FLAT.view(torch.uint8)[11:20]}, "'a' and 'b'"),
    "an expanded one": ({"a": FLAT[:1].expand(5), "b": FLAT}, "'a' and 'b'"),
    "behind others": ({**rows(4), "a": FLAT[:6], "b": FLAT[6:], "c": FLAT[5:7]}, "'a' and 'c'"),
}


@pytest.mark.parametrize("tensors", APART.values(), ids=APART)
def test_a_storage_in_common(tensors):
    assert why_whole(module_of(**tensors)) == ""


@pytest.mark.parametrize(("tensors", "names"), SHARED.values(), ids=SHARED)
def test_elements_in_common(tensors, names):
    assert f"parameters {names} have elements in the same memory" in why_whole(module_of(**tensors))


class Calls(TorchFunctionMode):
    """Counts the calls of torch within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def calls(tensors):
    module = module_of(**tensors)
    with Calls() as made:
        why_whole(module)
    return made.count


@pytest.mark.parametrize("tensors", [rows, columns])
def test_twice_as_many_are_twice_as_many_calls(tensors):
    assert calls(tensors(80)) < 2.5 * calls(tensors(40))


NOT_DENSE = {
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "a nested"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse (torch.sparse_coo)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fields", [{"offload_optimizer": "cpu"}, {"release_gradients": True}], ids=str)
@pytest.mark.parametrize(("make", "words"), NOT_DENSE.values(), ids=NOT_DENSE)
def test_state_is_paged_for_dense_parameters_only(make, words, fields):
    module = nn.Module()
    module.weight = nn.Parameter(make())
    with pytest.raises(PlanError) as caught:
        check_tensors(module, Plan(**fields))
    assert words in str(caught.value)
    assert "dense" in str(caught.value)
    assert ("sparse" in str(caught.value)) == ("sparse" in words)
    check_tensors(module, Plan())
