"""Which modules outside of blocks may be gathered by themselves, as the step shows it."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from workload.families import GPT

from lightning_largescale.workload import Workload

LARGE = 512


class Chunked(GPT):
    """Computes its loss with the head's weight, as losses in chunks do."""

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.head.weight)


class Penalised(GPT):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.tokens.weight.square().mean()


class Unused(GPT):
    def __init__(self):
        super().__init__(vocabulary=LARGE)
        self.extra = nn.Linear(LARGE, LARGE)


class Lent(GPT):
    """Its blocks call a module that is none of theirs."""

    def __init__(self):
        super().__init__(vocabulary=LARGE)
        self.lent = nn.Linear(32, 32 * 32)
        inside = self.blocks[1].forward
        self.blocks[1].forward = lambda x: inside(x) + self.lent(x).mean(-1, keepdim=True)


class Named(nn.Module):
    """No repeats. Reads a number as `kind`: of integers fakes have none."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = F.relu(self.two(F.relu(self.three(x))))
        return self.one(x) if self.kind(x.argmax() if self.kind is int else x.sum()) > -1 else x


class Split(nn.Module):
    """No repeats: an encoder and a decoder, the first of which gives its result away as `way` says."""

    def __init__(self, way):
        super().__init__()
        self.encoder = nn.Sequential(OrderedDict(act=nn.ReLU(inplace=way == "writes"), one=nn.Linear(64, 64)))
        self.encoder.forward = self.encode
        self.first, self.decoder, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.way = way

    def encode(self, x):
        made = self.encoder.one(self.encoder.act(x))
        if self.way == "object":
            return SimpleNamespace(made=made)
        if self.way == "view":
            return made[:]
        if self.way == "aside":
            self.aside = self.encoder.one(2 * x).square().mean()
        return {"made": made}

    def forward(self, x):
        made = self.encoder(self.first(x))
        if self.way == "view":
            made += 1
        made = made if self.way == "view" else made.made if self.way == "object" else made["made"]
        result = self.last(self.decoder(made))
        return self.aside + 0 * result.sum().detach() if self.way == "aside" else result


def batch():
    x = torch.randint(LARGE, (2, 16))
    return x, x


@pytest.mark.parametrize(
    ("make", "wraps"),
    [
        (lambda: GPT(vocabulary=LARGE), ("tokens", "head")),
        (lambda: GPT(vocabulary=LARGE, tied=True), ()),
        (lambda: Chunked(vocabulary=LARGE), ("tokens",)),
        (lambda: Penalised(vocabulary=LARGE), ("head",)),
        (Unused, ("tokens", "head")),
        (Lent, ("tokens", "head", "lent")),
    ],
    ids=["gpt", "tied", "chunked", "penalised", "unused", "lent"],
)
def test_wraps(make, wraps):
    module = make()
    work = Workload.trace(module, batch(), precisions=("32-true", "bf16-mixed"))
    assert work.wraps == wraps
    owners = {parameter.name: parameter.block for parameter in work.parameters}
    for name, owner in owners.items():
        first = name.split(".")[0]
        assert (owner == first) == (first in wraps)
    for step in work.steps.values():
        ran = [segment.block for segment in step.segments if segment.block]
        blocks = ["blocks.0", "blocks.1", "blocks.2"]
        assert ran == [
            *(["tokens"] if "tokens" in wraps else []),
            *blocks,
            *(["head"] if "head" in wraps else []),
        ]
    again = Workload.from_dict(work.to_dict())
    assert again == work


def test_blocks_that_call_a_wrap_stay_one_segment():
    step = Workload.trace(Lent(), batch(), precisions=("32-true",)).steps["32-true"]
    ran = [segment.block for segment in step.segments if segment.block]
    assert ran == ["tokens", "blocks.0", "blocks.1", "blocks.2", "head"]


@pytest.mark.parametrize(
    ("way", "found"), [("told", True), ("object", False), ("writes", False), ("view", False), ("aside", False)]
)
def test_what_fsdp_cannot_follow_is_no_wrap(way, found):
    work = Workload.trace(Split(way), torch.randn(4, 64), step="forward", precisions=("32-true",))
    assert work.approximate == ()
    assert {"encoder", "encoder.one"}.isdisjoint(work.wraps) == (not found)
    assert "first" in work.wraps


@pytest.mark.parametrize("kind", [float, int])
def test_segments_are_in_the_order_of_execution_and_real_steps_tell_too(kind):
    work = Workload.trace(Named(kind), torch.randn(4, 64), step="forward", precisions=("32-true",))
    assert any("a real step was measured" in note for note in work.approximate) == (kind is int)
    assert work.wraps == ("one", "two", "three")
    assert [segment.block for segment in work.steps["32-true"].segments if segment.block] == ["three", "two", "one"]
