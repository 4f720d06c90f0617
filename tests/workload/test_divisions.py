"""What is divided of a module's blocks, and of the rest, from what its step calls them with."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from workload.tensor_blocks import WIDTH, GPTBlock

from lightning_largescale.workload import Workload

VOCAB = 101


class Model(LightningModule):
    def __init__(self, *, tied=False, loss=F.cross_entropy):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Parameter(torch.zeros(8, WIDTH))
        self.blocks = nn.ModuleList(GPTBlock() for _ in range(3))
        self.head, self.small = nn.Linear(WIDTH, VOCAB, bias=False), nn.Linear(WIDTH, 2)
        if tied:
            self.head.weight = self.embedding.weight
        self.loss = loss

    def training_step(self, batch, index):
        x = self.embedding(batch) + self.places
        for block in self.blocks:
            x = block(x)
        self.log("size", float(x.norm()))
        return self.loss(self.head(x).flatten(0, 1), batch.flatten()) + self.small(x).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


BATCH = torch.zeros(2, 8, dtype=torch.long)


def divisions(model, ranks=2):
    found = Workload.trace(model, BATCH, precisions=("32-true",), tp_sizes=(ranks,))
    return found.divisions[ranks]


def test_blocks_and_vocabulary():
    found = divisions(Model())
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2", ""]
    assert len(found["blocks.0"].parts) == 10
    # Blocks that are alike are looked at once.
    assert found["blocks.0"] is found["blocks.1"] is found["blocks.2"]
    rest = found[""]
    assert {name: part.pieces for name, part in rest.parts.items()} == dict.fromkeys(
        ("embedding.weight", "head.weight"), (VOCAB,)
    )
    assert rest.whole == {"places": "it is small", "small.weight": "it is small"}
    # The table's rows, and of the loss the largest logits and two sums.
    assert len(rest.forward_reduced) == 3


def test_tied():
    assert set(divisions(Model(tied=True))[""].parts) == {"embedding.weight"}


def test_logits_that_something_else_reads_are_not_divided():
    def loss(logits, targets):
        return F.cross_entropy(logits, targets) + logits.logsumexp(-1).mean()

    rest = divisions(Model(loss=loss))[""]
    assert set(rest.parts) == {"embedding.weight"}
    assert rest.whole["head.weight"] == "logsumexp would have to gather it"
    assert not divisions(Model(loss=loss, tied=True))[""].parts


class Projected(LightningModule):
    """A projection whose outputs blocks need whole: to divide it costs what nothing else would."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 32)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)))

    def training_step(self, batch, batch_idx):
        return self.blocks(self.project(batch)).square().mean()


def test_what_blocks_are_given_is_not_divided():
    workload = Workload.trace(Projected(), torch.randn(4, 32), precisions=("32-true",), tp_sizes=(2,))
    found = workload.divisions[2]
    assert found[""].whole == {"project.weight": "its result would have to be gathered"}


def test_what_blocks_use_too_stays_whole():
    model = Model()
    model.blocks[0].up.weight = model.blocks[1].up.weight
    found = divisions(model)
    assert found["blocks.0"].whole["up.weight"] == "it is used outside of the block as well"
    assert "up.weight" in found["blocks.2"].parts


def test_full_backward_hooks():
    model = Model()
    model.blocks[1].up.register_full_backward_hook(lambda *_: None)
    found = divisions(model)
    assert not found["blocks.1"].parts
    assert set(found["blocks.1"].whole.values()) == {"full backward hooks are registered inside the block"}
    assert found["blocks.0"].parts


def test_compiled_parts():
    model = Model()
    model.blocks[1].up.compile(backend="eager")
    found = divisions(model)
    assert set(found["blocks.1"].whole.values()) == {"torch.compile wraps a part of the block"}
    assert found["blocks.0"].parts


class Remembering(GPTBlock):
    """Adds what it was given before, as caches of keys and values do."""

    def forward(self, x, memory):
        memory.append(x)
        return super().forward(x) + sum(memory[:-1], torch.zeros(()))


class WithMemory(Model):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Remembering() for _ in range(3))

    def training_step(self, batch, index):
        x, memory = self.embedding(batch), []
        for block in self.blocks:
            x = block(x, memory)
        return self.loss(self.head(x).flatten(0, 1), batch.flatten())


def test_what_blocks_write_into_is_theirs_alone():
    found = divisions(WithMemory())
    assert all(len(found[f"blocks.{index}"].parts) == 10 for index in range(3))


@pytest.mark.parametrize("batch", [None, BATCH])
def test_nothing_is_looked_for_unasked(batch):
    assert Workload.trace(Model(), batch, precisions=("32-true",)).divisions == {}
