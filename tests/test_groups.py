"""Groups of ranks are made once for a default group, and outlive neither it nor a fork."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import connected, ranks
from torch.distributed.device_mesh import init_device_mesh

from lightning_largescale.groups import drop_groups, forget_groups, made_once


def connect(folder, name):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size)


def of_two_default_groups(folder):
    found, every = [], []
    for name in ("first", "second"):
        connect(folder, name)
        groups = [made_once("any", dist.new_group) for _ in range(3)]
        found.append((len({*map(id, groups)}), groups[0].size()))
        every.append(groups[0])
        dist.barrier(groups[0])
        dist.destroy_process_group()
    return found, every[0] is not every[1], made_once("none", lambda: "made without a default group")


def test_made_once_for_a_default_group(tmp_path):
    with ranks(2) as made:
        expected = [(1, 2), (1, 2)], True, "made without a default group"
        assert made.run(of_two_default_groups, tmp_path) == [expected] * 2


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
