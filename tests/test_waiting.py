"""Ranks that wait for one another: how a wait is seen, and when it ends the run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from ranks import quiet, run_connected
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils.data import DataLoader

from lightning_largescale.failures import PeerFailures
from lightning_largescale.hub import Hub
from lightning_largescale.waiting import Awaited, Wait, Waiting, has_gone_on, sentence_of

pytestmark = quiet
READ = Wait(place="train.py:7 (watch)", read="isfinite", hook="on_after_backward")
STEP = Wait(place="train.py:9 (training_step)")


@pytest.mark.parametrize(
    ("waits", "finished", "rank"),
    [
        ({0: READ, 1: STEP}, False, 0),
        ({0: STEP, 1: READ}, False, 1),
        ({0: READ, 1: Wait(place="train.py:8 (watch)", read="any")}, False, 0),
        ({0: STEP, 1: STEP, 2: READ, 3: STEP}, False, 2),
        # The others have finished.
        ({0: READ}, True, 0),
        ({0: READ, 1: READ}, True, 0),
        # One is still at work, and may come.
        ({0: READ, 1: None}, False, None),
        ({0: READ, 1: None}, True, None),
        # All are in the same.
        ({0: READ, 1: READ}, False, None),
        ({0: STEP, 1: Wait(place="train.py:1 (fit)")}, False, None),
        ({0: STEP}, True, None),
        ({}, True, None),
    ],
)
def test_who_waits_in_vain(waits, finished, rank):
    found = sentence_of(waits, finished=finished)
    assert (found and found[0]) == rank
    if found is not None:
        assert re.match(rf"PlanError: rank {rank} reads a sharded tensor \(.*\) at train.py:\d", found[1])


@pytest.mark.parametrize("ends", ["waits", "finished"])
def test_the_hub_ends_a_run_of_ranks_that_wait_in_vain(ends):
    hub = Hub("127.0.0.1", 2, lambda rank: None)
    hub.start()
    peers = [PeerFailures(), PeerFailures()]
    for rank, peer in enumerate(peers):
        # Or this process, which is all of the ranks, would be ended.
        peer._over.set()
        peer.connect(rank, hub.endpoint)
    zero, one = peers
    zero._lines.send({"waits": {"place": "a.py:1 (f)", "read": "norm", "hook": "on_train_end"}})
    one._lines.send(
        {"waits": {"place": "a.py:2 (g)", "read": "", "hook": ""}} if ends == "waits" else {"finished": True}
    )
    assert zero._heard.wait(30)
    assert zero._first.stuck
    assert "rank 0 reads a sharded tensor (norm) at a.py:1 (f) in on_train_end" in str(zero._first)
    for peer in peers:
        peer._lines.close()
    hub.join()


@pytest.mark.parametrize(
    ("passed", "told", "gone_on"),
    [
        # It is inside of the module that the other left out, or steps beyond.
        ((1, 5, 3), (1, 4, 0), True),
        ((1, 6, 0), (1, 4, 0), True),
        ((1, 5, 3), (), True),
        # It idles before, also from the step before on.
        ((1, 5, 2), (1, 4, 0), False),
        ((1, 4, 9), (1, 4, 0), False),
        ((), (), False),
        # It has told, and what the other says of its wait is late.
        ((1, 5, 3), (1, 5, 2), False),
        ((1, 7, 3), (1, 7, 2), False),
        # It is in a fit before, or one after.
        ((0, 9, 3), (0, 4, 0), False),
        ((2, 9, 3), (1, 4, 0), False),
    ],
)
def test_who_has_gone_on_without_a_word(passed, told, gone_on):
    awaited = Awaited(place=(1, 5, 2), ranks=(0, 1), otherwise="")
    assert has_gone_on(awaited, passed, told) is gone_on
    # As JSON carries them.
    wait = Wait.of(json.loads(json.dumps(dataclasses.asdict(Wait(place="train.py:1 (f)", awaited=awaited)))))
    assert has_gone_on(wait.awaited, list(passed), list(told)) is gone_on


def seen(wait, began=None):
    """What is seen of a thread that waits in `wait`, from when it began until it ends, and how to wait for its end."""
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    if began is not None:
        began.wait()
    looks = Waiting(thread)
    found, number, due = None, 0, time.monotonic() + 60
    while found is None and thread.is_alive() and time.monotonic() < due:
        # The time is given: nothing here waits for it.
        found, number = looks.look(number * 10.0), number + 1
    return found, thread.join


def test_a_thread_that_has_ended_waits_for_nothing():
    thread = threading.Thread(target=int)
    thread.start()
    early = Waiting(thread)
    thread.join()
    assert early.look(0.0) is None
    assert Waiting(thread).look(0.0) is None


def wait_work(tensor, mesh):
    work = dist.all_reduce(tensor, async_op=True)
    work.wait()


def wait_works(tensor, mesh):
    for work in [dist.all_reduce(tensor, async_op=True) for _ in range(2)]:
        work.wait()


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient)
        return gradient


def call_gathered(tensor, mesh):
    block = nn.Linear(4, 4)
    fully_shard(block, mesh=mesh)
    block(tensor)


COLLECTIVES = {
    "all_reduce": lambda tensor, mesh: dist.all_reduce(tensor),
    "barrier": lambda tensor, mesh: dist.barrier(),
    "objects": lambda tensor, mesh: dist.broadcast_object_list([tensor], src=1),
    "work": wait_work,
    "works": wait_works,
    "nameless work": lambda tensor, mesh: dist.all_reduce(tensor, async_op=True).wait(),
    "function": lambda tensor, mesh: funcol.all_reduce(tensor, "sum", mesh).wait(),
    "tensor of a function": lambda tensor, mesh: funcol.all_reduce(tensor, "sum", mesh).sum(),
    "operator": lambda tensor, mesh: torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(tensor, "sum", mesh.get_group().group_name)
    ),
    "full_tensor": lambda tensor, mesh: DTensor.from_local(tensor, mesh, [Shard(0)]).full_tensor(),
    "reduction of shards": lambda tensor, mesh: DTensor.from_local(tensor, mesh, [Shard(0)]).sum() + 1,
    "backward": lambda tensor, mesh: Summed.apply(tensor.requires_grad_()).sum().backward(),
    "gathered": call_gathered,
}


def store():
    return dist.distributed_c10d._get_default_store()


def seen_in_collectives():
    """Of each collective what is seen of rank 0, to which the other comes when that is seen."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, enter in COLLECTIVES.items():
        collective = partial(enter, torch.ones(4), mesh)
        if dist.get_rank():
            store().wait([name])
            collective()
            continue
        found[name], join = seen(collective)
        store().set(name, "seen")
        join()
    return found


def test_a_thread_that_waits_in_a_collective_is_seen():
    found, _ = run_connected(2, seen_in_collectives)
    assert {name for name, wait in found.items() if wait is not None} == {*COLLECTIVES}
    assert all("test_waiting.py" in wait.place and not wait.read and not wait.agrees for wait in found.values())
    assert {name for name, wait in found.items() if wait.gathers} == {"gathered"}


class Step(nn.Module):
    """Calls what it is given as steps of a sharded module are called: below FSDP's frames."""

    def __init__(self, mesh):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        fully_shard(self, mesh=mesh)
        register_fsdp_forward_method(self, "step")

    def step(self, function):
        function()


def in_backward(function):
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(lambda gradient: function())
    tensor.sum().backward()


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        time.sleep(IDLE_SECONDS)
        return index


def receive():
    one, other = socket.socketpair()
    one.settimeout(IDLE_SECONDS)
    with one, other:
        one.recv(1)


def lock():
    held = threading.Lock()
    held.acquire()
    held.acquire(timeout=IDLE_SECONDS)


def answer():
    """What a thread is to give, by a `wait` that is no function of Python, as that of a collective."""
    waiter = torch.futures.Future()
    threading.Timer(IDLE_SECONDS, waiter.set_result, [None]).start()
    waiter.wait()


def child():
    with subprocess.Popen(["sleep", str(IDLE_SECONDS)]):
        os.wait()


IDLE_SECONDS = 0.4
IDLE = {
    "sleep": lambda: time.sleep(IDLE_SECONDS),
    "lock": lock,
    "event": lambda: threading.Event().wait(IDLE_SECONDS),
    "queue": lambda: queue.SimpleQueue().get(timeout=IDLE_SECONDS),
    "request": receive,
    "process": lambda: subprocess.run(["sleep", str(IDLE_SECONDS)], check=True),
    "child": child,
    "loader": lambda: next(iter(DataLoader(Slow(), num_workers=1))),
    "answer": answer,
    "in backward": lambda: in_backward(lambda: time.sleep(IDLE_SECONDS)),
}


def seen_idle():
    """What is seen of threads that idle in a step of a sharded module, half of the kinds on each rank."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "own"))["own"]
    step = Step(mesh).step
    found = {}
    for name in [*IDLE][dist.get_rank() :: 2]:
        began = threading.Event()

        def idle(name=name, began=began):
            began.set()
            with contextlib.suppress(queue.Empty, TimeoutError):
                IDLE[name]()

        found[name], join = seen(partial(step, idle), began)
        join()
    dist.barrier()
    return found


def test_a_thread_that_waits_for_something_else_is_not():
    one, other = run_connected(2, seen_idle)
    assert one | other == dict.fromkeys(IDLE)


SCRIPT = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

def watch(module, args, output):
    all(torch.isfinite(parameter).all() for parameter in module.parameters())

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
        self.head = nn.Linear(8, 8)
    def on_train_start(self):
        if KIND == "forward hook" and self.global_rank == 0:
            for module in self.net:
                module.register_forward_hook(watch)
    def training_step(self, batch, index):
        return self.head(self.net(batch)).square().mean()
    def on_after_backward(self):
        if KIND == "guarded hook" and self.trainer.is_global_zero:
            self.log("norm", self.net[0][0].weight.grad.norm())
    def on_train_batch_end(self, *_):
        if KIND == "histogram" and self.global_rank == 0:
            self.net[0][0].weight.detach().cpu().numpy()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    Trainer(accelerator="cpu", devices=2, strategy="largescale_fsdp", max_epochs=1, logger=False,
            enable_checkpointing=False).fit(Model(), DataLoader(torch.randn(32, 8), batch_size=4))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("forward hook", r"\(all\) at .*\(watch\) in training_step"),
        ("guarded hook", r"\(norm\) at .* in on_after_backward"),
        ("histogram", r"\(numpy\) at .* in on_train_batch_end"),
    ],
)
def test_a_rank_that_reads_alone_ends_the_run(tmp_path, kind, words):
    script = tmp_path / "train.py"
    script.write_text(f"KIND = {kind!r}\n{SCRIPT}")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert re.search(rf"PlanError: rank 0 reads a sharded tensor {words}, which every rank has to do", ended.stderr)


AGREES = Wait(place="train.py:5 (training_step)", agrees=True)


def test_a_collective_of_ones_own_beside_a_rank_that_is_to_hear_of_blocks():
    rank, sentence = sentence_of({0: AGREES, 1: STEP}, finished=False)
    assert rank == 1
    assert "rank 1 is in a collective at train.py:9 (training_step), and rank 0 waits at train.py:5" in sentence
    assert "call self.all_gather" in sentence
    # They wait for nothing but each other's word, or for what FSDP gathers on both.
    gathers = Wait(place="train.py:6 (training_step)", gathers=True)
    assert sentence_of({0: AGREES, 1: AGREES}, finished=False) is None
    assert sentence_of({0: AGREES, 1: gathers}, finished=False) is None
    assert sentence_of({0: AGREES, 1: None}, finished=False) is None
    rank, sentence = sentence_of({0: gathers, 1: STEP}, finished=False)
    assert rank == 1
    assert "rank 0 waits at train.py:6 (training_step) for it to gather a block; call" in sentence
    rank, sentence = sentence_of({1: AGREES}, finished=True)
    assert rank == 1
    assert re.match(r"PlanError: rank 1 runs a block at train.py:\d+ \(.*\), .* another rank has ended", sentence)


IDLES = """
import threading, time
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from lightning_largescale import LargeScaleStrategy, Plan

def idle():
    time.sleep(14)

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 32
    def __getitem__(self, index):
        if KIND == "loader" and index == 9:
            idle()
        return torch.randn(8, generator=torch.Generator().manual_seed(index))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(3)]), nn.Linear(8, 1)
        self.held = threading.Lock()
    def training_step(self, batch, index):
        alone = index >= (0 if "first" in KIND else 2) and self.global_rank == 0
        if index == 2 and alone and KIND in ("sleep", "skip"):
            idle()
        if index == 2 and alone and KIND == "lock":
            self.held.acquire()
            threading.Timer(14, self.held.release).start()
            self.held.acquire()
        if "collective" in KIND and alone:
            dist.all_reduce(batch.sum())
        if KIND == "work" and alone:
            dist.all_reduce(batch.sum(), async_op=True).wait()
        # All ranks alike, from a step on; or one of them.
        skips = index >= 2 if KIND == "skip" else alone and KIND == "skip alone"
        for block in self.blocks[skips:]:
            batch = block(batch)
        return self.head(batch).square().mean()
    def on_after_backward(self):
        if KIND == "upload" and self.trainer.global_step == 2 and self.trainer.is_global_zero:
            idle()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    trainer = Trainer(accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
                      use_distributed_sampler=PLAN == "dp_shard", strategy=LargeScaleStrategy(Plan(**{PLAN: 2})))
    trainer.fit(Model(), DataLoader(Slow(), batch_size=4))
    print("trained", trainer.global_step)
"""


def run_idles(tmp_path, kind, plan):
    script = tmp_path / "train.py"
    script.write_text(f"KIND, PLAN = {kind!r}, {plan!r}\n{IDLES}")
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "plan"),
    [(kind, "dp_shard") for kind in ("sleep", "lock", "loader", "upload", "skip")]
    + [(kind, "tp") for kind in ("skip", "sleep")],
)
def test_a_rank_that_idles_ends_no_run(tmp_path, kind, plan):
    ended = run_idles(tmp_path, kind, plan)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"trained {4 if plan == 'dp_shard' else 8}") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "plan", "words"),
    [
        ("collective", "dp_shard", r"PlanError: rank 0 is in a collective at .*\(training_step\), and rank 1 waits"),
        ("work", "dp_shard", r"PlanError: rank 0 is in a collective at .*\(training_step\), and rank 1 waits"),
        ("skip alone", "tp", r"'blocks.1.up' where another one, .* runs 'blocks.0.up', as in the step before"),
        ("collective at first", "tp", r"PlanError: rank 0 is in a collective at .*, and rank 1 waits"),
    ],
)
def test_ranks_that_wait_for_one_another_end_the_run(tmp_path, kind, plan, words):
    ended = run_idles(tmp_path, kind, plan)
    assert ended.returncode != 0
    assert re.search(words, ended.stderr), ended.stderr
