"""Which kinds of tensors among a module's parameters and buffers a plan serves, asked before anything is planned.

What a plan gathers, it gathers into plain dense tensors: other kinds stay whole where nothing trains them, and are
refused where something does. Buffers of any kind stay whole, and are made equal on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_largescale import compat
from lightning_largescale.plan import Plan, PlanError

# Dtypes that every backend of torch.distributed takes.
EVERYWHERE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def check_tensors(module: nn.Module, plan: Plan) -> None:
    """Make sure that `plan` serves every parameter and buffer of `module`, which is not sharded yet.

    Raises:
        PlanError: it does not serve one; names it, and what to do.
    """
    for name, tensor in _tensors(module):
        if is_lazy(tensor) and (plan.world_size > 1 or plan.gathers or plan.offloads or plan.release_gradients):
            raise lazy_error(name)
        if not is_lazy(tensor) and plan.world_size > 1 and not tensor.is_meta and not compat.dense_parts(tensor):
            raise PlanError(
                f"{name!r} is of layout {tensor.layout}, whose values ranks cannot tell one another; keep it dense and"
                " convert it where it is used, or train on one process."
            )
    reason = why_whole(module) if plan.gathers else ""
    if reason:
        raise PlanError(f"{reason}, or take a plan that keeps parameters whole (dp_replicate).")
    for name, parameter in module.named_parameters():
        if not is_lazy(parameter) and parameter.requires_grad and plan.world_size > 1 and not is_plain(parameter):
            raise PlanError(
                f"parameter {name!r} is {_in_words(parameter)}, whose gradients ranks cannot average; make it a dense"
                " parameter of torch, or train on one process."
            )
        if not is_lazy(parameter) and parameter.requires_grad and _is_expanded(parameter):
            raise PlanError(
                f"parameter {name!r} is expanded: several of its elements are one in memory, which no optimizer writes"
                " into; make it of `.clone()`."
            )


def lazy_error(name: str) -> PlanError:
    """What is said of a parameter or buffer of a lazy module, which has no shape yet."""
    return PlanError(
        f"{name!r} is of a lazy module, so it has no shape to plan with; call the module once on a batch in __init__ or"
        " setup, or build its layer with sizes given."
    )


def find_lazy(module: nn.Module) -> str | None:
    """The name of a parameter or buffer of `module` that has no shape yet."""
    return next((name for name, tensor in _tensors(module) if is_lazy(tensor)), None)


def why_whole(module: nn.Module) -> str:
    """Why parameters of `module`, which is not sharded, cannot be gathered from shards, and what to do; else empty."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or (is_plain(parameter) and parameter.dtype in EVERYWHERE):
            continue
        if is_plain(parameter):
            kept = str(parameter.dtype).removeprefix("torch.")
            return f"parameter {name!r} is of {kept}, which not every backend gathers; keep it as a buffer"
        if parameter.requires_grad or compat.is_wrapper(parameter):
            return (
                f"parameter {name!r} is {_in_words(parameter)}, and plans that shard or offload parameters gather plain"
                " dense ones; make it a dense parameter of torch"
            )
    shared = _shared_memory(module)
    if shared is not None:
        one, other = shared
        return (
            f"parameters {one!r} and {other!r} have elements in the same memory, which are several once they are"
            " sharded or offloaded; register one parameter under both names, or give each memory of its own"
        )
    return ""


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is dense, and computes as torch's own class of tensors; a class of parameters may say more."""
    plain_class = type(tensor) in (Tensor, nn.Parameter) or nn.Parameter in type(tensor).__mro__
    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return plain_class and dense and not compat.is_wrapper(tensor)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _in_words(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    return f"of the class {type(tensor).__name__}"


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements of `tensor` share memory by a stride of 0."""
    if tensor.layout is not torch.strided or tensor.is_nested or compat.is_wrapper(tensor):
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _shared_memory(module: nn.Module) -> tuple[str, str] | None:
    """Names of two parameters that have elements in common and are two objects."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in module.named_parameters():
        if not is_lazy(parameter) and not parameter.is_meta and is_plain(parameter) and parameter.numel():
            by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
    for sharing in by_storage.values():
        for (one, first), (other, second) in itertools.combinations(sharing, 2):
            if _overlap(first, second):
                return one, other
    return None


def _overlap(one: Tensor, other: Tensor) -> bool:
    if _span(one).stop <= _span(other).start or _span(other).stop <= _span(one).start:
        return False
    start = min(_span(one).start, _span(other).start)
    taken = torch.zeros(max(_span(one).stop, _span(other).stop) - start, dtype=torch.bool)
    _bytes_in(taken, one, start).fill_(True)
    return bool(_bytes_in(taken, other, start).any())


def _span(tensor: Tensor) -> range:
    """The bytes of its storage from the first to the last element of `tensor`."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(first, first + (reach + 1) * size)


def _bytes_in(taken: Tensor, tensor: Tensor, start: int) -> Tensor:
    """Of `taken`, one element for each byte of a storage from `start` on, those that `tensor` has."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return taken.as_strided((*tensor.shape, size), (*strides, 1), _span(tensor).start - start)
