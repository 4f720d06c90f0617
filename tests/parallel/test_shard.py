"""Sharding: what each rank keeps, what is gathered at once, and what cannot be divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from models import DIM, Language, Tokens, trainer
from ranks import quiet
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


def local_bytes(tensors):
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


class Measured(Language):
    """Counts what is alive: the rank's own bytes, and gathered blocks in every block's forward and backward."""

    def __init__(self, **options):
        super().__init__(layers=5, **options)
        self.gathered = []

    def on_fit_start(self):
        for block in self.blocks:
            block.up.register_forward_hook(self.count)

    def count(self, part, inputs, output):
        self.note()
        output.register_hook(lambda gradient: self.note())

    def note(self):
        weights = [block.up.weight for block in self.blocks]
        self.gathered.append(sum(not isinstance(weight, DTensor) for weight in weights))

    def on_before_optimizer_step(self, optimizer):
        self.gradients = local_bytes(p.grad for p in self.parameters() if p.grad is not None)


def measure(plan):
    model = Measured(seed=int(os.environ["RANK"]), frozen=True)
    run = trainer(LargeScaleStrategy(plan), devices=plan.world_size, max_steps=3)
    run.fit(model)
    state = [value for values in run.optimizers[0].state.values() for value in values.values() if value.dim()]
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "parameters": local_bytes(model.parameters()),
        "gradients": model.gradients,
        "state": local_bytes(state),
        "whole": sum(p.nbytes for p in model.parameters()),
        "trained": sum(p.nbytes for p in trained),
        "gathered": max(model.gathered),
        "storages": sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()),
    }


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("reshard", [True, False])
def test_memory_is_divided(two, reshard, recompute):
    plan = Plan(dp_shard=2, reshard_after_forward=reshard, activation_checkpointing=recompute)
    for found in two.run(measure, plan):
        assert found["parameters"] == pytest.approx(found["whole"] / 2, rel=0.02)
        assert found["gradients"] == pytest.approx(found["trained"] / 2, rel=0.02)
        assert found["state"] == pytest.approx(found["trained"], rel=0.02)
        assert found["storages"] == pytest.approx(found["whole"] / 2, rel=0.02)
        assert found["gathered"] == (1 if reshard else 5)


class Apart(Language):
    """Notes which of its parts are gathered as each of them computes, and as its gradient does."""

    def on_fit_start(self):
        self.gathered = set()
        for part in (self.embedding, self.blocks[1].up, self.head):
            part.register_forward_pre_hook(lambda part, inputs: self.look())
            part.register_forward_hook(lambda part, inputs, output: output.register_hook(self.look) and None)

    def look(self, gradient=None):
        parts = {"embedding": self.embedding, "block": self.blocks[1].up, "head": self.head, "norm": self.norm}
        self.gathered.add(frozenset(name for name, one in parts.items() if not isinstance(one.weight, DTensor)))


def gathered_apart(plan):
    model = Apart()
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=2).fit(model)
    return model.gathered


def test_what_is_wrapped_is_gathered_while_it_computes(two):
    wrapped = ("embedding", "head")
    once = {frozenset({"norm", name}) for name in ("embedding", "block", "head")}
    for found in two.run(gathered_apart, Plan(dp_shard=2, extra_fsdp_modules=wrapped)):
        # Backward gathers the next ahead.
        assert once <= found <= once | {one | other for one in once for other in once}
        assert frozenset({"norm", "embedding", "head"}) not in found
    for found in two.run(gathered_apart, Plan(dp_shard=2)):
        assert all({"norm", "embedding", "head"} <= names for names in found)


class Heads(Language):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(DIM, 2), nn.Embedding(2, DIM)])


def fit_wrapped(*names):
    trainer(LargeScaleStrategy(Plan(dp_shard=2, extra_fsdp_modules=names)), devices=2).fit(Heads())


class Evaluated(Language):
    """Reads in its validation what no training step reads; ranks have other numbers of batches."""

    def validation_step(self, batch, index):
        self.loss(batch)
        self.evaluated.append(float(self.head.weight.norm()) + float(self.embedding.weight[0].sum()))

    def val_dataloader(self):
        data = Tokens(4 if self.trainer.global_rank else 8)
        return torch.utils.data.DataLoader(data, batch_size=4)

    def on_validation_end(self):
        self.sharded = [isinstance(weight, DTensor) for weight in (self.head.weight, self.embedding.weight)]


def evaluate(plan, devices):
    model = Evaluated()
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    run = trainer(strategy, devices=devices, max_steps=4, val_check_interval=2, limit_val_batches=2)
    run.fit(model)
    return model.losses, model.evaluated, model.sharded


@pytest.mark.parametrize("reshard", [True, False])
def test_an_evaluation_reads_what_is_wrapped_as_what_is_not(two, reshard):
    losses, norms, _ = evaluate(None, 1)
    plan = Plan(dp_shard=2, extra_fsdp_modules=("embedding", "head"), reshard_after_forward=reshard)
    first, second = two.run(evaluate, plan, 2)
    assert first == (pytest.approx(losses, rel=1e-5), pytest.approx(norms, rel=1e-5), [True, True])
    # Half the batches: one in the sanity check, one in each validation.
    assert second == (pytest.approx(losses, rel=1e-5), pytest.approx(norms[::2], rel=1e-5), [True, True])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("haed",), "extra_fsdp_modules has 'haed' and Heads has no such module; .*, such as 'head'"),
        (
            ("heads",),
            "extra_fsdp_modules has 'heads', a ModuleList, which is not called itself; give the modules",
        ),
        (("blocks.1.up",), "extra_fsdp_modules has 'blocks.1.up', which lies in 'blocks.1'; give modules outside"),
        (("blocks.1",), "extra_fsdp_modules has 'blocks.1', which lies in 'blocks.1'; give modules outside"),
        (("blocks",), "extra_fsdp_modules has 'blocks', which has repeated blocks; give modules outside"),
    ],
)
def test_what_cannot_be_wrapped(two, names, message):
    with pytest.raises(PlanError, match=message):
        two.run(fit_wrapped, *names)


@pytest.mark.slow
def test_memory_is_divided_among_the_shards_of_each_replica(four):
    for found in four.run(measure, Plan(dp_replicate=2, dp_shard=2)):
        assert found["parameters"] == pytest.approx(found["whole"] / 2, rel=0.02)
        assert found["state"] == pytest.approx(found["trained"], rel=0.02)
        assert found["gathered"] == 1


class Odd(Language):
    """Rows that do not divide evenly, parameters without dimensions, and blocks of which only parts are called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.odd = nn.Parameter(torch.randn(3, 16) * 0.02)
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position + self.odd.sum(0)
        for block in self.blocks:
            x = x + block.down(torch.relu(block.up(block.norm(x)))) * self.one
        return self.norm(x) * self.scale


def fit_odd(plan, devices, steps=8):
    model = Odd()
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    run = trainer(strategy, devices=devices, max_steps=steps, gradient_clip_val=0.1, accumulate_grad_batches=2)
    run.fit(model)
    return model.losses


@pytest.mark.parametrize("plan", [Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False)])
def test_odd_parameters_and_blocks_called_by_parts(two, plan):
    for losses in two.run(fit_odd, plan, 2):
        assert losses == pytest.approx(fit_odd(None, 1), rel=1e-5)


class Bad(LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        if kind == "meta":
            self.layer.to("meta")
        elif kind == "lazy":
            self.other = nn.LazyLinear(4)
        elif kind == "ranks":
            self.other = nn.Linear(4, 4 + int(os.environ["RANK"]))
        elif kind == "early":
            self.optimizer = torch.optim.SGD(self.parameters())

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return getattr(self, "optimizer", None) or torch.optim.SGD(self.parameters())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4))


def fit_bad(kind):
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2).fit(Bad(kind))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "meta",
            "'layer.weight' is on the meta device, so it has no values; build the module with its values",
        ),
        ("lazy", "'other.weight' is of a lazy module, so it has no shape to plan with"),
        ("ranks", "Bad has other parameters or buffers on rank 1 than on rank 0; build the same module on every rank"),
        ("early", "SGD holds a parameter of shape .* that is not of .* as it was sharded"),
    ],
)
def test_what_cannot_be_divided_is_refused_on_all_ranks(two, kind, message):
    with pytest.raises(PlanError, match=message):
        two.run(fit_bad, kind)


def fit_twice(second):
    model = Language()
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=2).fit(model)
    trainer(LargeScaleStrategy(second), devices=2, max_steps=2).fit(model)
    return model.losses


def test_a_divided_module_goes_on_under_a_plan_that_divides_it_alike(two):
    same = two.run(fit_twice, Plan(dp_shard=2))
    assert two.run(fit_twice, Plan(dp_shard=2, reshard_after_forward=False, activation_checkpointing="full")) == same


@pytest.mark.slow
@pytest.mark.parametrize("size", ["70B", "405B"])
def test_a_model_of_a_thousand_ranks_on_meta(size):
    """The benchmark's process, whose memory is a bound that is kept; its seconds are the benchmark's."""
    script = Path(__file__).parents[2] / "benchmarks" / "large_models.py"
    done = subprocess.run([sys.executable, script, "--one", size], capture_output=True, text=True, check=False)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["gib"] < 8
    assert float(found["words"].split("%")[0]) >= 95
