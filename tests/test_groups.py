"""Groups of ranks are made once for a default group, and outlive neither it nor a fork."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from ranks import connected, ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from lightning_largescale import groups
from lightning_largescale.groups import connect as connect_ranks
from lightning_largescale.groups import drop_groups, forget_groups, leave_process_group, made_once


def connect(folder, name):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size)


def of_two_default_groups(folder):
    found, every = [], []
    for name in ("first", "second"):
        connect(folder, name)
        made = [made_once("any", dist.new_group) for _ in range(3)]
        found.append((len({*map(id, made)}), made[0].size()))
        every.append(made[0])
        dist.barrier(made[0])
        dist.destroy_process_group()
    return found, every[0] is not every[1], made_once("none", lambda: "made without a default group")


def test_made_once_for_a_default_group(tmp_path):
    with ranks(2) as made:
        expected = [(1, 2), (1, 2)], True, "made without a default group"
        assert made.run(of_two_default_groups, tmp_path) == [expected] * 2


def meets_again(backend):
    """What others are told who ask for the port of this rank's store while its group is left, and a sum after that."""
    environment, told = TorchElasticEnvironment(), []
    for _ in range(3):
        connect_ranks(environment, backend, torch.device("cpu"), timedelta(seconds=60))
        dist.barrier()
        leave_process_group()
        with socket.socket() as other, contextlib.suppress(OSError):
            other.bind(("", environment.main_port))
            told.append("was given the port")
    connect_ranks(environment, backend, torch.device("cpu"), timedelta(seconds=60))
    one = torch.ones(())
    dist.all_reduce(one)
    dist.destroy_process_group()
    return float(one), told


def test_ranks_that_left_meet_again_at_a_port_that_nobody_else_is_given():
    with ranks(2) as made:
        (total, told), _ = made.run(meets_again, "gloo")
        # The ranks' parent holds it too, as long as they live.
        assert (total, told) == (2.0, [])


def goes_with_its_mesh():
    """Whether a group goes when its ranks leave it, of whose mesh an operator's result is remembered."""
    connect_ranks(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    mesh = made_once("mesh", lambda: init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
    assert (tensor + tensor).device_mesh is mesh
    group = weakref.ref(dist.group.WORLD)
    del mesh, tensor
    dist.barrier()
    leave_process_group()
    return group() is None


def sums():
    dist.init_process_group("gloo")
    one = torch.ones(())
    dist.all_reduce(one)
    dist.destroy_process_group()
    return float(one)


def test_groups_of_meshes_that_torch_remembers_go_with_their_store():
    with ranks(2) as made:
        assert made.run(goes_with_its_mesh) == [True, True]
        # Where the store were still there, with what was written, they would wait for ever.
        assert made.run(sums) == [2.0, 2.0]


def test_a_port_is_kept_from_who_asks_for_any_and_given_to_who_asks_for_it():
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    groups._keep_port(("kept", str(port)))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("", port))
        store.listen()
        # Nothing is to be kept where somebody listens.
        groups._keep_port(("taken", str(port)))
    groups._keep_port(("", ""))
    assert [*groups._ports] == [("kept", str(port))]
    groups._ports.popitem()[1].close()


def ends_of_forks(folder):
    """How a fork ends that lets go of all groups it knows of, one of which nobody else has."""
    connect(folder, "parent")
    made_once("any", dist.new_group)
    dist.destroy_process_group()
    child = os.fork()
    if not child:
        forget_groups()
        gc.collect()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def ends_of_forks_with_garbage(folder):
    """The same of one whose parent has not collected a group that it has left."""
    gc.disable()
    connect(folder, "garbage")
    garbage = [dist.group.WORLD]
    garbage.append(garbage)
    dist.destroy_process_group()
    del garbage
    child = os.fork()
    if not child:
        gc.collect()
        os._exit(0)
    gc.enable()
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("ends", [ends_of_forks, ends_of_forks_with_garbage])
def test_a_fork_leaves_groups_to_its_parent(tmp_path, ends):
    with ranks(2) as made:
        assert made.run(ends, tmp_path) == [0, 0]


def threads_of_gloo():
    names = []
    for number in os.listdir("/proc/self/task"):
        # Others end meanwhile.
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/self/task/{number}/comm").read_text())
    return len([name for name in names if "gloo" in name])


def threads_after_dropping(times):
    """Threads of gloo that are left each time that groups and a mesh, which a module has for longer, are dropped."""
    found = []
    for _ in range(times):
        made_once("group", lambda: [dist.new_group([rank]) for rank in range(2)])
        mesh = made_once("mesh", lambda: init_device_mesh("cpu", (2, 1)))
        drop_groups()
        with_mesh = threads_of_gloo()
        mesh.get_group(0).size()
        del mesh
        gc.collect()
        found.append((with_mesh, threads_of_gloo()))
    return found


def test_groups_that_are_dropped_leave_no_threads_behind():
    with ranks(2) as made:
        for first, *others in made.run(connected, threads_after_dropping, 3):
            # Groups of one dimension have connections of their own.
            assert first[0] > first[1]
            assert others == [first] * 2


def drop_what_is_under_way(folder):
    """Ranks that each wait for what the other has not sent."""
    connect(folder, "under_way")
    (group,) = made_once("group", lambda: [dist.new_group()])
    rank = dist.get_rank()
    dist.broadcast(torch.zeros(4), 1 - rank, group=group, async_op=True)
    del group
    drop_groups()
    return rank


@pytest.mark.slow
def test_groups_are_dropped_in_which_something_is_under_way(tmp_path):
    with ranks(2) as made:
        assert made.run(drop_what_is_under_way, tmp_path) == [0, 1]
