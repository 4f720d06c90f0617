"""Creation, reuse and destruction of the default process group and other process groups.

Other groups are created once per default group, since each has threads and connections, or a communicator, and a
program may fit many times on the same ranks.
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
# The default group for which `_made` was created; with another one, `_made` is dropped.
_world: list[weakref.ref[Any]] = []
_inherited: list[Any] = []
# Number of default groups left, by address and port of their rendezvous.
_left: dict[tuple[str, str], int] = {}
# Sockets that reserve the ports at which this rank hosted the store, until the next rendezvous there.
_ports: dict[tuple[str, str], socket.socket] = {}
# Timeout and pause of a rank's attempts to reach the store: another store, or none, may answer at the port.
_ASKING, _PAUSE_SECONDS = timedelta(seconds=20), 0.1
# Time for groups without running collectives to end.
_ENDING_SECONDS = 2.0


def made_once(key: Hashable, make: Callable[[], _Made]) -> _Made:
    """Return the result of `make`, a group or an object with groups, cached for the life of the default process group.

    Args:
        key: the cache key; the same on all ranks.
        make: the function that creates the object: a collective.
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
            # A module may still hold the mesh after it is dropped here; its groups end with the mesh.
            groups = [weakref.ref(group) for group in made.get_all_groups()]
            weakref.finalize(made, _end_later, groups, os.getpid()).atexit = False
    found: _Made = _made[key]
    return found


def forget_groups() -> None:
    """Drop all cached groups; the connections of those that nothing else refers to close."""
    _made.clear()
    _world.clear()


def drop_groups() -> None:
    """Drop all cached groups and end those in lists, in which collectives of failed ranks cannot complete."""
    groups = [one for made in _made.values() if isinstance(made, list) for one in made]
    forget_groups()
    _end(groups)


def _end_later(groups: Sequence[weakref.ref[Any]], process: int) -> None:
    """End the groups of a collected mesh that still exist, but not in a fork, where they are the parent's."""
    if os.getpid() == process:
        _end([one() for one in groups])


def _end(groups: list[Any]) -> None:
    """Close the connections of groups other than the default one; torch would keep them as long as that.

    NCCL groups are not destroyed: aborting one while others have running collectives may wait forever.
    """
    for group in groups:
        # All groups end with the default group.
        if not dist.is_initialized() or not isinstance(group, dist.ProcessGroup) or group is dist.group.WORLD:
            continue
        # The group may belong to an earlier default group.
        with contextlib.suppress(ValueError):
            if "nccl" not in dist.get_backend(group):
                dist.destroy_process_group(group)
    group = None
    # Dropping the last reference to a group waits for its running collectives, which may never complete.
    ending = threading.Thread(target=groups.clear, daemon=True, name="lightning_largescale groups")
    ending.start()
    ending.join(_ENDING_SECONDS)


def connect(environment: Any, backend: str, device: Any, timeout: timedelta | None) -> None:
    """Initialize the default process group of the cluster `environment` unless one is initialized.

    Args:
        environment: Lightning's cluster environment.
        backend: torch.distributed's name of the backend.
        device: the device of this process.
        timeout: the time to wait for the other ranks; None for torch's default.
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
    """Return the store for a rendezvous of ranks that have left their default group `times` times.

    The store's server runs in rank 0. If rank 0 has not left the old group yet, another rank reaches the old server
    with its old keys, loses the connection when rank 0 leaves, and tries again.
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
    """Return the device on which the default group's collectives take `tensor`.

    This is the tensor's device, or the CUDA device for a CPU tensor if NCCL is the only backend.
    """
    return torch.device("cuda") if tensor.device.type == "cpu" and dist.get_backend() == "nccl" else tensor.device


def leave_process_group() -> None:
    """Close this rank's connections, so that peers in a collective with it get an error instead of waiting.

    Gloo closes a connection once nothing refers to its group. Modules may still refer to it, also garbage of earlier
    fits; a peer that gets no error is ended by its own watcher. NCCL is aborted, since destroying it would wait for
    running collectives.
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
    """Reserve the port, so that the system does not assign it to a process that binds to any free port.

    A process that binds to this very port and listens still gets it. The ranks know no other port for the next
    rendezvous.

    Source: man page socket(7), SO_REUSEADDR.
    """
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A process that still listens at the port keeps it, as torchrun's agent does.
    with contextlib.suppress(OSError, ValueError, OverflowError):
        found.bind(("", int(endpoint[1])))
        if (before := _ports.pop(endpoint, None)) is not None:
            before.close()
        _ports[endpoint] = found
        return
    found.close()


def end_groups() -> None:
    """End the default group of a single process, and all other groups."""
    _forget_all()
    dist.destroy_process_group()


def _forget_all() -> None:
    """Drop all cached groups, also those that torch keeps.

    Torch caches meshes for the life of the process, and with them their groups, threads and rendezvous store, in which
    later groups would find old keys.
    """
    for made in _made.values():
        if isinstance(made, DeviceMesh):
            compat.forget_groups_of(made)
    forget_groups()


def _leave_in_fork() -> None:
    # The groups' threads and connections are the parent's. Ending them here would end the process, and so would garbage
    # collection of a group.
    gc.freeze()
    _inherited.append(dict(_made))
    _left.clear()
    for port in _ports.values():
        port.close()
    _ports.clear()
    forget_groups()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_in_fork)
