"""Replication: parameters that steps do not use train as in a plain run, and nothing is printed of it."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from models import Block, Language, trainer
from ranks import quiet
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Unused(Language):
    """Some parameters are never used, one block in every other step: weight decay must not touch the unused."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.spare = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens):
        x = super().forward(tokens)
        return self.spare[0](x) if len(self.losses) % 2 else x

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def fit(plan, devices):
    model = Unused()
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=8)
    run.fit(model)
    weight = model.never.weight.detach()
    copied = None
    if plan is None or plan.dp_shard == 1:
        copied = type(copy.deepcopy(model)) is Unused
    return model.losses, getattr(weight, "full_tensor", lambda: weight)(), copied


@pytest.mark.parametrize(
    "plan", [Plan(dp_replicate=2), Plan(dp_shard=2), Plan(dp_shard=2, reshard_after_forward=False)]
)
def test_unused_parameters(two, plan, capfd):
    expected, untouched, _ = fit(None, 1)
    for losses, weight, copied in two.run(fit, plan, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert torch.equal(weight, untouched)
        assert copied in (True, None)
    assert "find_unused_parameters" not in capfd.readouterr().err


def reductions(accumulated):
    """How often gradients were reduced in two optimizer steps of so many micro-batches each."""
    model = Language()
    run = trainer(LargeScaleStrategy(Plan(dp_replicate=2)), devices=2, max_steps=2, accumulate_grad_batches=accumulated)
    count = []

    def hook(state, bucket):
        count.append(bucket.index())
        return (
            torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])
        )

    wrap = torch.nn.parallel.DistributedDataParallel.__init__

    def init(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    torch.nn.parallel.DistributedDataParallel.__init__ = init
    try:
        run.fit(model)
    finally:
        torch.nn.parallel.DistributedDataParallel.__init__ = wrap
    return len(count), model.losses


def test_accumulation_reduces_once_a_step(two):
    assert {count for count, _ in two.run(reductions, 1)} == {count for count, _ in two.run(reductions, 4)}


class Hooked(LightningModule):
    """Looks at its gradients in all hooks between a backward and the step, and in one of them changes them."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 1)
        self.kind, self.automatic_optimization = kind, "manual" not in kind
        self.seen = []

    def look(self):
        self.seen.append([float(one.grad.norm()) for one in self.parameters()])

    def clip(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)

    def training_step(self, batch, index):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        x = batch[rank::ranks].requires_grad_()
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=True) if "reentrant" in self.kind else block(x)).relu()
        loss = self.head(x).square().mean()
        if self.kind == "guards" and index == 2 and rank == ranks - 1:
            loss = loss * float("nan")
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.look()
        optimizer.step()
        return None

    def on_after_backward(self):
        self.look()
        if self.kind in ("clips", "manual", "reentrant", "accumulates"):
            self.clip()
        if self.kind == "guards" and any(bool(one.grad.isnan().any()) for one in self.parameters()):
            self.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        if self.kind != "guards":
            self.look()

    def configure_gradient_clipping(self, optimizer, *_, **__):
        if self.kind == "clips":
            self.look()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)


class OwnBackward(Hooked):
    """Changes its gradients in its own backward already, or has none for a loss that is not finite."""

    def backward(self, loss, *args, **kwargs):
        if not loss.isfinite():
            return
        super().backward(loss, *args, **kwargs)
        self.look()
        self.clip()
        if self.kind == "backward of two":
            super().backward(self.head.weight.square().sum())


def hooked(strategy, devices, kind):
    model = (OwnBackward if "backward" in kind else Hooked)(kind)
    accumulated = 2 if "accumulates" in kind else 1
    trainer(strategy, devices=devices, max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulated).fit(model)
    return model.seen, {name: one.detach().clone() for name, one in model.state_dict().items()}


KINDS = [
    *("clips", "guards", "reentrant", "accumulates", "manual"),
    *("clips in backward", "reentrant in backward", "accumulates in backward", "manual in backward"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_after_backward_see_averages(two, kind):
    plain_seen, expected = hooked("auto", 1, kind)
    ours = two.run(hooked, LargeScaleStrategy(Plan(dp_replicate=2)), 2, kind)
    stock = two.run(hooked, "ddp", 2, kind)
    for (seen, weights), (seen_there, weights_there) in zip(ours, stock, strict=True):
        torch.testing.assert_close(weights, weights_there, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen, seen_there, rtol=1e-5, atol=1e-6, equal_nan=True)
        if "accumulates" not in kind:
            # There what a hook clips between two reductions is each rank's own.
            torch.testing.assert_close(seen, plain_seen, rtol=1e-5, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_second_backward_after_the_average_is_refused(two):
    with pytest.raises(PlanError, match=r"gradients of loss.backward\(\), which are each rank's own; run one backward"):
        two.run(hooked, LargeScaleStrategy(Plan(dp_replicate=2)), 2, "backward of two")
