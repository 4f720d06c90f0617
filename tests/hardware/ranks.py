"""Functions run by a gloo process group of forked processes: half a second where spawning takes eight."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import lightning_largescale.compat  # noqa: F401  (brings Lightning, which each rank would else import by itself)


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank, the text of its traceback where it raised."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_rank, args=(rank, world, port, pipes[rank][1], function, args)) for rank in range(world)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads, since Python 3.12
            for process in processes:
                process.start()
        return [pipe.recv() if pipe.poll(60) else "no answer" for pipe, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()


def _rank(rank: int, world: int, port: int, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        pipe.send(function(*args))
    except Exception:
        pipe.send(traceback.format_exc())
    finally:
        dist.destroy_process_group()
