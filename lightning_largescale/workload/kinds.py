"""Check the kinds of tensors among a module's parameters and buffers against a plan, before anything is planned.

A plan all-gathers parameters into plain dense tensors. Parameters of other kinds stay unsharded if they are not
trained, and are refused if they are. Buffers of any kind stay unsharded, and are made equal on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan

# Dtypes that every backend of torch.distributed accepts.
EVERYWHERE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}


def check_tensors(module: nn.Module, plan: Plan) -> None:
    """Check that `plan` supports every parameter and buffer of `module`, which is not sharded yet.

    Raises:
        PlanError: the plan does not support a tensor; the error names the tensor and a remedy.
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
        dense = is_lazy(parameter) or (parameter.layout is torch.strided and not parameter.is_nested)
        if not dense and parameter.requires_grad and (plan.offload_optimizer or plan.release_gradients):
            raise PlanError(
                f"parameter {name!r} is {_in_words(parameter)}, and optimizer state is paged for dense parameters only;"
                " make it a dense parameter of torch, or leave out offload_optimizer and release_gradients."
            )
        if not is_lazy(parameter) and parameter.requires_grad and _is_expanded(parameter):
            raise PlanError(
                f"parameter {name!r} is expanded: several of its elements are one in memory, which no optimizer writes"
                " into; make it of `.clone()`."
            )


def lazy_error(name: str) -> PlanError:
    """Return the error for a parameter or buffer of a lazy module, which has no shape yet."""
    return PlanError(
        f"{name!r} is of a lazy module, so it has no shape to plan with; call the module once on a batch in __init__ or"
        " setup, or build its layer with sizes given."
    )


def find_lazy(module: nn.Module) -> str | None:
    """Return the name of a parameter or buffer of `module` that has no shape yet; None if all have one."""
    return next((name for name, tensor in _tensors(module) if is_lazy(tensor)), None)


def why_whole(module: nn.Module) -> str:
    """Return why parameters of `module`, not sharded yet, cannot be all-gathered, and a remedy; empty if they can."""
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
    """Return whether `tensor` is dense and computes as `torch.Tensor` does; `nn.Parameter` subclasses count as such."""
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
    """Return whether elements of `tensor` share memory through a stride of 0."""
    if tensor.layout is not torch.strided or tensor.is_nested or compat.is_wrapper(tensor):
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _shared_memory(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of two distinct parameters that share elements in memory; None if there are none."""
    by_storage: dict[int, list[_StorageSpan]] = {}
    for name, parameter in module.named_parameters():
        if not is_lazy(parameter) and not parameter.is_meta and is_plain(parameter) and parameter.numel():
            extent = _StorageSpan(name, parameter, _span(parameter))
            by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(extent)
    for sharing in by_storage.values():
        for run in _overlapping_runs(sharing):
            shared = _first_shared(run)
            if shared is not None:
                one, other = sorted(shared, key=sharing.index)
                return one.name, other.name
    return None


@dataclass(frozen=True, eq=False)
class _StorageSpan:
    """A parameter and the bytes of its storage from its first to its last element."""

    name: str
    parameter: Tensor
    span: range


def _overlapping_runs(extents: list[_StorageSpan]) -> Iterator[list[_StorageSpan]]:
    """Group the spans of one storage, in order, into runs that overlap; spans that overlap no other are left out."""
    run: list[_StorageSpan] = []
    stop = 0
    for extent in sorted(extents, key=lambda one: one.span.start):
        if extent.span.start >= stop:
            if len(run) > 1:
                yield run
            run = []
        run.append(extent)
        stop = max(stop, extent.span.stop)
    if len(run) > 1:
        yield run


def _first_shared(run: list[_StorageSpan]) -> tuple[_StorageSpan, _StorageSpan] | None:
    """Return two parameters of a run that share elements; each is compared with all before it at once."""
    start, stop = run[0].span.start, max(one.span.stop for one in run)
    taken = torch.zeros(stop - start, dtype=torch.bool)
    for place, extent in enumerate(run):
        own = _bytes_in(taken, extent, start)
        if own.any():
            own_alone = torch.zeros_like(taken)
            _bytes_in(own_alone, extent, start).fill_(True)
            return next(one for one in run[:place] if _bytes_in(own_alone, one, start).any()), extent
        own.fill_(True)
    return None


def _span(tensor: Tensor) -> range:
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(first, first + (reach + 1) * size)


def _bytes_in(taken: Tensor, extent: _StorageSpan, start: int) -> Tensor:
    """Return the view of `taken`, one element per byte of a storage from `start` on, at a parameter's bytes."""
    size = extent.parameter.element_size()
    shape, strides = extent.parameter.shape, extent.parameter.stride()
    # An expanded dimension has one element in memory, and torch refuses to write into overlapping elements.
    lengths = [1 if stride == 0 else length for length, stride in zip(shape, strides, strict=True)]
    return taken.as_strided((*lengths, size), (*(stride * size for stride in strides), 1), extent.span.start - start)
