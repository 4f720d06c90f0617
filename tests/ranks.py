"""Ranks that a test runs functions in: forks of the test session, started once for many cases."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_largescale import compat
from lightning_largescale.groups import leave_process_group, made_once

# What Lightning and torch advise or deprecate among themselves, which no test here is about.
ADVICE = (
    r".* is deprecated",
    r"The '.*_dataloader' does not have many workers",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"You .*`configure_optimizers`.*lr_scheduler",
    r".*`training_step` .* number of training batches",
    r"You're resuming from a checkpoint that ended before the epoch",
    r"FSDP2-wrapped module .* returned a view tensor",
    r"The \.grad attribute of a Tensor that is not a leaf",  # torch.compile's own look at what it traces
)
quiet = [pytest.mark.filterwarnings(f"ignore:{message}") for message in ADVICE]
# Virtual machines exist that announce AMX and end the process that uses it. Read when bfloat16 is first computed with.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
# A rank that waits for one that failed is told so within these seconds; a busy machine needs some.
_TIMEOUT_SECONDS = 240


class Ranks:
    """`size` processes, connected to nothing yet, in an environment as torchrun makes it; others after an end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._port: socket.socket | None = None

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What `function` of a module returns on each rank; the first error that a rank had is raised."""
        answers = self.answers(function, *args, **kwargs)
        for rank, (error, trace, _) in enumerate(answers):
            if error is not None:
                error.__cause__ = RuntimeError(f"on rank {rank}:\n{trace}")
                raise error
        return [value for _, _, value in answers]

    def answers(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Of each rank the error that `function` of a module raised, or None, its traceback as text, and the result."""
        if not self._processes:
            self.start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(_TIMEOUT_SECONDS):
                    answers += [other.recv() for other in self._pipes[rank + 1 :] if other.poll()]
                    others = "".join(f"\nanother:\n{trace}" for error, trace, _ in answers if error is not None)
                    raise TimeoutError(f"rank {rank} said nothing for {_TIMEOUT_SECONDS} s{others}")
                answers.append(pipe.recv())
            except (EOFError, TimeoutError):
                self.end()
                raise
        return answers

    def end(self) -> None:
        """Kill the processes; the next run starts others."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()
        self._pipes.clear()
        if self._port is not None:
            self._port.close()

    def start(self) -> None:
        """Fork the processes, of this one as it is now."""
        # Held, or others are given it before the first rank listens there.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("", 0))
        port = self._port.getsockname()[1]
        context = multiprocessing.get_context("fork")
        # torch's caches keep process groups of this process; a fork that drops them waits for threads that it lacks.
        compat.forget_cached_meshes()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)


@contextlib.contextmanager
def ranks(world_size: int) -> Iterator[Ranks]:
    """Ranks for the time of a `with` block, started at once."""
    made = Ranks(world_size)
    made.start()
    try:
        yield made
    finally:
        made.end()


def connected(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` on a rank, in a gloo process group of all ranks for that time."""
    dist.init_process_group("gloo")
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


def in_own_group(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` on a rank, which connects as it needs to and is in no process group after it."""
    leave_process_group()
    try:
        return function(*args, **kwargs)
    finally:
        leave_process_group()


def mesh_of(shape: tuple[int, ...] | None = None) -> DeviceMesh:
    """Of all ranks of a launch, connected as a Trainer would and from then on; with a dimension for tp and dp_shard."""
    if not dist.is_initialized():
        compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    shape = shape or (dist.get_world_size(),)
    names = ("dp_shard", "tp")[-len(shape) :]
    return made_once(("test", shape, names), lambda: init_device_mesh("cpu", shape, mesh_dim_names=names))


def divided_by_two() -> nn.Module:
    """Two layers that two ranks shard, whose first has a dimension of five rows, and a root without own parameters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    for part in (*module, module):
        fully_shard(part, mesh=mesh_of((2,)))
    return module


def run_connected(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of some ranks of its own, connected."""
    with ranks(world_size) as made:
        return made.run(connected, function, *args)


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    warnings.resetwarnings()
    warnings.simplefilter("error")
    for message in ADVICE:
        warnings.filterwarnings("ignore", message=message)
    # Threads of OpenMP do not survive a fork; one asks for none.
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "test",
    }
    parent = os.getppid()
    while True:
        # The other ranks have this pipe open too, so the end of the test session does not close it.
        while not pipe.poll(1):
            if os.getppid() != parent:
                return
        function, args, kwargs = pipe.recv()
        # Ranks of a user have no seed in common.
        torch.manual_seed(rank)
        random.seed(rank)
        np.random.seed(rank)
        try:
            answer = (None, "", function(*args, **kwargs))
        except BaseException as error:
            answer = (error, traceback.format_exc(), None)
        pipe.send(answer)
