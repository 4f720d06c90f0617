"""Ranks that wait for one another: how a wait is seen, and when it ends the run."""

from __future__ import annotations

import re
import subprocess
import threading

import pytest
import torch.distributed as dist
from torch.distributed.elastic.utils.store import barrier

from lightning_largescale.failures import PeerFailures
from lightning_largescale.hub import Hub
from lightning_largescale.waiting import Wait, Waiting, sentence_of

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


def wait_in(wait, release):
    """What is seen of a thread that waits in `wait` until `release` is called."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(wait()), daemon=True)
    thread.start()
    looks = Waiting(thread)
    found = None
    for number in range(1000):
        # The time is given: nothing here waits for it.
        found = looks.look(number * 10.0)
        if found is not None or ended:
            break
    release()
    thread.join()
    return found


def test_a_thread_that_waits_in_a_collective_is_seen():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    found = wait_in(
        lambda: barrier(client, 2, "meeting", barrier_timeout=60), lambda: server.set("meeting/last_member", "1")
    )
    assert found is not None
    assert "test_waiting.py" in found.place
    assert not found.read


def test_a_thread_that_waits_for_something_else_is_not():
    release = threading.Event()
    assert wait_in(release.wait, release.set) is None


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
    ended = subprocess.run(["python", str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert re.search(rf"PlanError: rank 0 reads a sharded tensor {words}, which every rank has to do", ended.stderr)


AGREES = Wait(place="train.py:5 (training_step)", agrees=True)


def test_a_collective_of_ones_own_beside_a_rank_that_is_to_hear_of_blocks():
    rank, sentence = sentence_of({0: AGREES, 1: STEP}, finished=False)
    assert rank == 1
    assert "rank 1 is in a collective at train.py:9 (training_step), and rank 0 waits at train.py:5" in sentence
    assert "call self.all_gather" in sentence
    # They wait for nothing but each other's word, or for a time.
    assert sentence_of({0: AGREES, 1: AGREES}, finished=False) is None
    assert sentence_of({0: Wait(place="train.py:5 (f)", ends_itself=True), 1: READ}, finished=False) is None
    rank, sentence = sentence_of({1: AGREES}, finished=True)
    assert rank == 1
    assert re.match(r"PlanError: rank 1 runs a block at train.py:\d+ \(.*\), .* another rank has ended", sentence)
