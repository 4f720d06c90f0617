import dataclasses
import pickle

import pytest
import torch
from ranks import run_connected
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_largescale import compat


# Compressed layouts say that they are new.
@pytest.mark.filterwarnings("ignore:Sparse")
def test_dense_parts():
    matrix = torch.eye(3)
    assert compat.dense_parts(matrix)[0] is matrix
    for layout, shapes in [(torch.sparse_coo, [(2, 3), (3,)]), (torch.sparse_csr, [(4,), (3,), (3,)])]:
        assert [tuple(part.shape) for part in compat.dense_parts(matrix.to_sparse(layout=layout))] == shapes
    assert len(compat.dense_parts(matrix.to_sparse_csc())) == 3
    assert compat.dense_parts(matrix.to_mkldnn()) == []


@pytest.mark.filterwarnings("ignore")
def test_dense_parts_are_written_into():
    codes = torch.quantize_per_tensor(torch.ones(2, 3), 0.5, 0, torch.qint8)
    ragged = [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=one) for one in _LAYOUTS]
    for tensor in (codes, *ragged):
        for part in compat.dense_parts(tensor):
            if part.dtype not in (torch.int64,):
                part.zero_()
        assert not any(float(one.abs().sum()) for one in (tensor.dequantize().unbind() if tensor is codes else tensor))


_LAYOUTS = (torch.strided, torch.jagged)


def test_is_wrapper():
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert compat.is_wrapper(ragged)
    assert not any(map(compat.is_wrapper, (torch.ones(2), nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse())))


class Told(torch.Tensor):
    """A tensor that tells what is asked of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (func, compat.call_as_tensor(func, args, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return torch.tensor(7.0)


def test_tensor_without_values():
    made = compat.tensor_without_values(Told, (2, 3), torch.bfloat16, torch.device("cpu"))
    told = type(made), compat.call_as_tensor(torch.Tensor.size, (made,), {})
    assert told == (Told, (2, 3))
    assert compat.call_as_tensor(torch.Tensor.neg, (made,), {}) == 7


def test_call_as_tensor():
    made = compat.tensor_without_values(Told, (2,), torch.float32, torch.device("cpu"))
    assert made.size() == (torch.Tensor.size, (2,))
    assert compat.call_as_tensor(torch.Tensor.size, (made,), {}) == (2,)


@dataclasses.dataclass
class Held:
    value: object


def test_leaves_of_any_containers():
    assert compat.leaves({"a": [1, (2,)], "b": (unknown := object())}) == [1, 2, unknown]
    assert compat.leaves([Held([3, Held(4)]), Held]) == [3, 4, Held]


def test_version_counts_writes():
    tensor = torch.zeros(2)
    before = compat.version(tensor)
    _ = tensor + 1
    assert compat.version(tensor) == before
    tensor.add_(1)
    assert compat.version(tensor) > before


def test_is_transformed():
    seen = []
    torch.func.grad(lambda x: (seen.append(compat.is_transformed(x)), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert not compat.is_transformed(torch.ones(2))


class Aliased(compat.DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.alias = compat.alias(made)
        return made


def test_alias():
    with Aliased() as mode:
        made = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
    assert mode.alias.data_ptr() == made.data_ptr()
    assert mode.alias.grad_fn is None
    before = compat.version(mode.alias)
    with torch.no_grad():
        made.add_(1)
    assert compat.version(mode.alias) == before + 1


def test_storage_users():
    for device in ("cpu", "meta"):
        tensor = torch.empty(3, device=device)
        storage = tensor.untyped_storage()
        assert compat.storage_users(storage) == 1
        views = [tensor[1:], tensor.detach()]
        assert compat.storage_users(storage) == 3
        views.pop()
        assert compat.storage_users(storage) == 2
        assert len(views) == 1


def test_versions_of():
    tensor = torch.ones(2).requires_grad_() * 1
    versions = compat.versions_of(tensor)
    assert versions.untyped_storage().nbytes() == 0
    before = compat.version(versions)
    tensor[:1].add_(1)
    assert compat.version(versions) == compat.version(tensor) == before + 1


def saved_to_a_directory(path):
    mesh = init_device_mesh("cpu", (1,))
    checkpoint.save({"weight": DTensor.from_local(torch.ones(2), mesh, [Shard(0)])}, checkpoint_id=path)


def test_pickled_globals(tmp_path):
    run_connected(1, saved_to_a_directory, tmp_path)
    named = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        Reader(file).load()
    private = {(module, name) for module, name in named if name.startswith("_")}
    # All of that module is what a directory's metadata is made of.
    assert compat.pickled_globals() == {one for one in private if one[0] != "torch.distributed.checkpoint.metadata"}
