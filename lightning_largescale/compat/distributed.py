"""Private APIs of torch.distributed: process groups and collectives."""

from __future__ import annotations

import dis
from pathlib import Path
from types import FrameType
from typing import Any


def fake_process_group() -> None:
    """Replace the process groups of this process with a fake one of as many ranks, whose collectives return at once.

    A fork inherits connections that it must not use. Replaced by a public way to leave a process group without notice
    to the other ranks.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, size = dist.get_rank(), dist.get_world_size()
    # Kept, since the other ranks would be notified of the end of a group.
    _left.append(distributed_c10d._world)
    distributed_c10d._world = distributed_c10d._World()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


_left: list[Any] = []


def forget_groups_of(mesh: Any) -> None:
    """Drop the references of `mesh` to its process groups, so that their threads can end; it finds groups by name.

    Replaced by a `destroy_process_group` that ends gloo's threads even if a group is still referenced.
    """
    # Not in torch 2.11.
    getattr(mesh, "_pg_registry", {}).clear()


def abort_process_groups() -> None:
    """Close all nccl communicators of this process without waiting for the collectives under way.

    Replaced by a public `torch.distributed.abort_process_group`; the public `destroy_process_group` waits.
    """
    from torch.distributed.distributed_c10d import _abort_process_group

    _abort_process_group()


# Namespaces of the operators that are collectives.
_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"})
# Operators in these namespaces that not all ranks enter at once.
_OF_FEWER = frozenset({"send", "recv_", "recv_any_source_", "wait_tensor", "_wrap_tensor_autograd"})


def is_collective(operator: Any) -> bool:
    """Return whether an operator, as a dispatch mode receives it, is a collective that all ranks enter at once.

    Replaced by a public tag of these operators.
    """
    namespace, _, name = operator.name().partition("::")
    return namespace in _NAMESPACES and name.partition(".")[0] not in _OF_FEWER


def calls_collective(frame: FrameType) -> bool:
    """Return whether the innermost frame of a blocked thread runs a collective, or waits for one.

    Other code around a collective runs in other frames: FSDP's step, DTensor's rules, a wrapper of the user's. Replaced
    by a public way to ask a process group whether a thread waits for its peers.
    """
    import torch
    from torch.distributed import _functional_collectives, distributed_c10d

    filename = frame.f_code.co_filename
    if filename == torch._ops.__file__:
        # The frame's `self` is an operator or a packet of overloads: its name begins with the namespace.
        return str(frame.f_locals.get("self")).partition(".")[0] in _NAMESPACES
    if filename in (distributed_c10d.__file__, _functional_collectives.__file__):
        return True
    root = f"{Path(torch.__file__).parent}/"
    if filename.startswith(root) and not filename.startswith(f"{root}distributed/"):
        # For example torch.futures, whose `wait` may be for any kind of work.
        return False
    return _waits_for_work(frame)


def _waits_for_work(frame: FrameType) -> bool:
    """Return whether `frame` calls, without a timeout, `wait` of a `Work` in a variable, or of an unnamed object."""
    import torch.distributed as dist

    before = [one for one in dis.get_instructions(frame.f_code) if one.offset <= frame.f_lasti]
    if not before or "CALL" not in before.pop().opname:
        return False
    while before and before[-1].opname in ("PRECALL", "CACHE", "PUSH_NULL"):
        before.pop()
    if not before or before[-1].opname not in ("LOAD_METHOD", "LOAD_ATTR") or before.pop().argval != "wait":
        return False
    names = before[-1].argval if before and before[-1].opname.startswith(_LOADS) else None
    name = names[-1] if isinstance(names, tuple) else names
    for held in (frame.f_locals, frame.f_globals):
        if name in held:
            return isinstance(held[name], dist.Work)
    return True


_LOADS = ("LOAD_FAST", "LOAD_NAME", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF", "STORE_FAST_LOAD_FAST")


def all_gather_tensor(output: Any, tensor: Any, group: Any = None) -> None:
    """All-gather a tensor.

    Replaced by `torch.distributed.all_gather_single` alone once the oldest supported torch has it; torch 2.13 warns of
    the name that torch 2.11 has.

    Args:
        output: The tensor to write into, in the order of ranks.
        tensor: This rank's part.
        group: The process group; None is the default one.
    """
    import torch.distributed as dist

    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, tensor, group=group)


def reduce_scatter_tensor(output: Any, tensor: Any, group: Any = None) -> None:
    """Reduce-scatter the sum of a tensor.

    Replaced by `torch.distributed.reduce_scatter_single` alone, as `all_gather_tensor`.

    Args:
        output: The tensor to write this rank's part into.
        tensor: This rank's addend.
        group: The process group; None is the default one.
    """
    import torch.distributed as dist

    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(output, tensor, group=group)


def ignore_parameters(module: Any, names: list[str]) -> None:
    """Exclude the parameters of these names from a DistributedDataParallel that wraps `module`.

    Replaced by a public argument of DistributedDataParallel.
    """
    from torch.nn.parallel import DistributedDataParallel

    if names:
        wrapper: Any = DistributedDataParallel
        wrapper._set_params_and_buffers_to_ignore_for_model(module, names)
