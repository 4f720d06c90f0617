"""Process groups beside the default one, made once: each has threads and connections, or a communicator, of its own.

A program may fit many times, on the same ranks.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_largescale import compat

_Made = TypeVar("_Made")
_made: dict[Hashable, Any] = {}
# The default group that they were made beside; beside another they are not used.
_world: list[weakref.ref[Any]] = []
_inherited: list[Any] = []


def made_once(key: Hashable, make: Callable[[], _Made]) -> _Made:
    """What `make` returns, a group or what has some: made when all ranks first ask for it, and kept for as long as the
    default process group is the same.

    Args:
        key: of it; the same on all ranks.
        make: a collective.
    """
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None:
        return make()
    if not _world or _world[0]() is not world:
        forget_groups()
        _world.append(weakref.ref(world))
    if key not in _made:
        _made[key] = make()
    found: _Made = _made[key]
    return found


def forget_groups() -> None:
    """Let all of them go, with their connections."""
    _made.clear()
    _world.clear()


def end_groups() -> None:
    """End the default group of a single process, and all beside it.

    torch remembers meshes for as long as the process lives, and these their groups, with the threads that they have.
    """
    for made in _made.values():
        if isinstance(made, DeviceMesh):
            compat.forget_groups_of(made)
    forget_groups()
    dist.destroy_process_group()


def _leave_in_fork() -> None:
    # Their threads are the parent's: to end them here would end the process.
    _inherited.append(dict(_made))
    forget_groups()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_fork)
