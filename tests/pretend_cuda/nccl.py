"""torch.distributed's "nccl" on the pretended device: gloo carries what the device's streams order."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_device: Any = None  # the extension


class _Options:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.is_high_priority_stream = False
        self._timeout: timedelta | None = None
        self.split_from = None
        self.split_color = 0
        self.global_ranks_in_group: list[int] = []
        self.group_name = ""


class _KnownByName(type):
    """isinstance(group, ProcessGroupNCCL) is asked of what the extension makes."""

    def __instancecheck__(cls, one: object) -> bool:
        name = getattr(one, "name", None)
        return callable(name) and name() == "nccl"


class ProcessGroupNCCL(metaclass=_KnownByName):
    """Makes groups of the pretended device, as torch's makes its own."""

    Options = _Options

    def __new__(cls, store: Any, rank: int, size: int, options: _Options) -> Any:
        inner = _gloo("pretended nccl", store, rank, size, options._timeout)
        return _device.group(rank, size, inner, list(options.global_ranks_in_group) or list(range(size)))


class _SplitOptions:
    """What a group is asked for before it is split."""

    def __deepcopy__(self, memo: Any) -> Any:
        return torch._C._distributed_c10d.Backend.Options("nccl")


def _gloo(prefix: str, store: Any, rank: int, size: int, timeout: timedelta | None = None) -> Any:
    return dist.ProcessGroupGloo(dist.PrefixStore(prefix, store), rank, size, timeout or timedelta(minutes=10))


def install(extension: Any) -> None:
    """Have torch.distributed find NCCL."""
    global _device
    _device = extension
    dist.ProcessGroupNCCL = distributed_c10d.ProcessGroupNCCL = ProcessGroupNCCL
    distributed_c10d._NCCL_AVAILABLE = True
    distributed_c10d.default_pg_nccl_timeout = distributed_c10d.default_pg_timeout
    backend = torch._C._distributed_c10d.Backend
    backend.options = property(lambda group: _SplitOptions())
    # What torch puts around the aborts of several groups.
    backend._group_start = backend._group_end = lambda group: None
    # What a rank does that takes no part in a new group.
    backend.perform_nocolor_split = lambda group, device: None
    torch._C._nccl_version = lambda: 2 << 32 | 29 << 16 | 7
    torch._C._nccl_version_suffix = lambda: b""
    extension.set_maker(lambda store, rank, size: _gloo("pretended split", store, rank, size))
