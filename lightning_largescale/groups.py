"""The default process group, and those beside it, made once: each has threads and connections, or a communicator.

A program may fit many times, on the same ranks.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh

from lightning_largescale import comm, compat

_Made = TypeVar("_Made")
_made: dict[Hashable, Any] = {}
# The default group that they were made beside; beside another they are not used.
_world: list[weakref.ref[Any]] = []
_inherited: list[Any] = []
# How often groups were left, by the address and the port at which their ranks had met.
_left: dict[tuple[str, str], int] = {}
# The port of each where this rank had the store, until ranks meet there again.
_ports: dict[tuple[str, str], socket.socket] = {}
# For a rank that asks for the store: what answers at its port may be another's, or nobody.
_ASKING, _PAUSE_SECONDS = timedelta(seconds=20), 0.1
# For groups to end in which nothing is under way.
_ENDING_SECONDS = 2.0


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
        made = _made[key] = make()
        if isinstance(made, DeviceMesh):
            # Where it is forgotten a module may still have it, and nobody once that is gone.
            groups = [weakref.ref(group) for group in made.get_all_groups()]
            weakref.finalize(made, _end_later, groups, os.getpid()).atexit = False
    found: _Made = _made[key]
    return found


def forget_groups() -> None:
    """Let all of them go, with their connections."""
    _made.clear()
    _world.clear()


def drop_groups() -> None:
    """Forget all of them, and end those beside meshes: what ranks that failed began there is met by nothing."""
    groups = [one for made in _made.values() if isinstance(made, list) for one in made]
    forget_groups()
    _end(groups)


def _end_later(groups: Sequence[weakref.ref[Any]], process: int) -> None:
    """End those of `groups`, of a mesh that is no more, that there still are; in a fork they are the parent's."""
    if os.getpid() == process:
        _end([one() for one in groups])


def _end(groups: list[Any]) -> None:
    """Close the connections of groups beside the default one, which torch would keep for as long as that.

    Those of nccl stay: to abort one while others have collectives under way may wait for ever.
    """
    for group in groups:
        # With the default group all have ended.
        if not dist.is_initialized() or not isinstance(group, dist.ProcessGroup) or group is dist.group.WORLD:
            continue
        # Of an earlier default group.
        with contextlib.suppress(ValueError):
            if "nccl" not in dist.get_backend(group):
                dist.destroy_process_group(group)
    group = None
    # The last reference to one waits for what is under way there, which may be met by nothing.
    ending = threading.Thread(target=groups.clear, daemon=True, name="lightning_largescale groups")
    ending.start()
    ending.join(_ENDING_SECONDS)


def connect(environment: Any, backend: str, device: Any, timeout: timedelta | None) -> None:
    """Connect this process to the others of the cluster `environment`, if it is not yet.

    Args:
        environment: Lightning's.
        backend: of torch.distributed.
        device: of this process.
        timeout: for the others to come; None for torch's own.
    """
    if dist.is_initialized():
        return
    endpoint = environment.main_address, str(environment.main_port)
    times = _left.get(endpoint, 0)
    store = _met_again(environment, times, timeout or default_pg_timeout) if times else None
    compat.init_process_group(environment, backend, device, timeout, store)
    if (port := _ports.pop(endpoint, None)) is not None:
        port.close()


def _met_again(environment: Any, times: int, timeout: timedelta) -> Any:
    """The store in which ranks meet that have left their group `times` times.

    Its server lives in rank 0. Where that has not left yet, another rank finds the server of the group that is left,
    with all that was written there, and loses it when rank 0 leaves: then it asks again.
    """
    rank, size, deadline = (
        environment.global_rank(),
        environment.world_size(),
        time.monotonic() + timeout.total_seconds(),
    )
    asking = timeout if rank == 0 else min(timeout, _ASKING)
    while True:
        try:
            server, *_ = next(dist.rendezvous("env://", rank, size, timeout=asking))  # type: ignore[attr-defined]
            store = dist.PrefixStore(f"largescale/{times}", server)  # type: ignore[attr-defined]
            store.set(f"here/{rank}", "")
            store.wait([f"here/{one}" for one in range(size)], asking)
            server.set_timeout(timeout)
            return store
        except dist.DistError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


def carrying_device(tensor: Tensor) -> torch.device:
    """Where collectives of all ranks take `tensor`: where it is, or the CUDA device, for what is in DRAM of ranks that
    are connected by NCCL alone.
    """
    return torch.device("cuda") if tensor.device.type == "cpu" and dist.get_backend() == "nccl" else tensor.device


def leave_process_group() -> None:
    """Close this rank's connections, so that peers in a collective with it get an error instead of waiting.

    gloo closes a connection when nobody refers to its group any longer, which modules may, also those of earlier fits
    that nobody else needs; a peer that sees no end is ended by its own watcher. nccl is aborted: destroying it would
    wait for the collectives that are under way.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    _forget_all()
    endpoint = (os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    _left[endpoint] = _left.get(endpoint, 0) + 1
    had_store = comm.rank() == 0
    if "nccl" in dist.get_backend():
        compat.abort_process_groups()
    else:
        dist.destroy_process_group()
    gc.collect()
    if had_store:
        _keep_port(endpoint)


def _keep_port(endpoint: tuple[str, str]) -> None:
    """Have the system give the port to nobody who asks for any; who asks for this one, to listen at it, has it.

    It was free once, and ranks know no other: whoever is given it meanwhile keeps them from meeting again.

    Source: man page socket(7), SO_REUSEADDR.
    """
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Who still listens there keeps it, as torchrun's agent does.
    with contextlib.suppress(OSError, ValueError, OverflowError):
        found.bind(("", int(endpoint[1])))
        if (before := _ports.pop(endpoint, None)) is not None:
            before.close()
        _ports[endpoint] = found
        return
    found.close()


def end_groups() -> None:
    """End the default group of a single process, and all beside it."""
    _forget_all()
    dist.destroy_process_group()


def _forget_all() -> None:
    """Let all groups go, for torch too: it remembers meshes for as long as the process lives, and these their groups,
    with threads, and with the store that they met in, where others would find what was left there.
    """
    for made in _made.values():
        if isinstance(made, DeviceMesh):
            compat.forget_groups_of(made)
    forget_groups()


def _leave_in_fork() -> None:
    # Their threads and connections are the parent's: to end them here would end the process. So would the next
    # collection where some of them are garbage.
    gc.freeze()
    _inherited.append(dict(_made))
    _left.clear()
    for port in _ports.values():
        port.close()
    _ports.clear()
    forget_groups()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_fork)
