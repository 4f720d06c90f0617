"""Private APIs of tensors: data, storage, views and version counters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def version(tensor: Any) -> int:
    """Return the version counter of `tensor`, which operations that write into it increase.

    Replaced by a public `torch.Tensor.version`; a comparison of values would synchronize a device.
    """
    return int(tensor._version)


def versions_of(tensor: Any) -> Any:
    """Return a tensor without memory that shares the version counter of `tensor`.

    Replaced by a public `torch.Tensor.version`, and a way to keep the counter without the tensor.
    """
    found = tensor.detach()
    # Replaces all but the counter.
    found.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return found


def alias(tensor: Any) -> Any:
    """Return a tensor with the data and the version counter of `tensor` and without its graph, in a dispatch mode.

    Replaced by `Tensor.detach`, if it shared the counter below autograd, as torch.utils.checkpoint needs it too.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def view_base(tensor: Any) -> Any:
    """Return the tensor of which `tensor` is a view for autograd; None if it is no view.

    Replaced by a public `Tensor.base`.
    """
    return tensor._base


def storage_users(storage: Any) -> int:
    """Return how many tensors use the storage of `storage`, a Python object of it; those that a graph saves count.

    Replaced by a public reference count of storages.
    """
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def is_transformed(tensor: Any) -> bool:
    """Return whether `tensor` is a wrapper of torch.func's transforms, which has no storage.

    Replaced by a public name in torch.func.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_wrapper(tensor: Any) -> bool:
    """Return whether `tensor` is of a subclass, other than DTensor, that holds other tensors and has no data itself.

    Replaced by a public name for it.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or hasattr(tensor, "device_mesh"):
        return False
    return is_traceable_wrapper_subclass(tensor)


def dense_parts(tensor: Any) -> list[Any]:
    """Return the dense tensors that hold the data of `tensor`, to read and to write; none for an unknown layout.

    These are the tensor itself; indices and values of a sparse tensor; the members of a nested tensor; the codes of a
    quantised tensor, as bytes; the inner tensors of a wrapper subclass.

    Replaced by `Tensor.indices` and `Tensor.values`, if they accepted a sparse tensor that is not coalesced, and by
    public names for the inner tensors of the others.
    """
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in dense_parts(getattr(tensor, name))]
    if tensor.is_nested:
        return [part for member in tensor.unbind() for part in dense_parts(member)]
    if tensor.is_quantized:
        codes = tensor.untyped_storage()
        return [torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(codes)]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def tensor_without_values(kind: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tensor of a subclass that has no storage.

    Replaced by a public way to make a wrapper subclass of Tensor.

    Args:
        kind: The subclass, which implements `__torch_dispatch__`.
        shape: The shape that the tensor reports.
        dtype: The dtype that it reports.
        device: The device that it reports.
    """
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of `tree`, of nested containers and dataclasses, as FSDP2 finds the tensors of a forward.

    Replaced by a public name for `torch.utils._pytree.tree_leaves`.
    """
    from torch.utils._pytree import tree_leaves

    found: list[Any] = []
    for leaf in tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, one.name) for one in dataclasses.fields(leaf) if hasattr(leaf, one.name)])
        else:
            found.append(leaf)
    return found


def pickled_globals() -> set[tuple[str, str]]:
    """Return the private globals that the metadata of a torch.distributed.checkpoint directory names, each with its
    module: a layout of tensors, and the place of a tensor in a file.

    Replaced by a public safe reader of that metadata.
    """
    return {("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
