"""Checkpoints with the states of fewer optimizers, or of more, than a module makes: loaded as far as there are both."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import Language, trainer
from ranks import quiet

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

STEPS = 2


class Several(Language):
    """Steps each of its optimizers, which have parameters of their own and a scheduler each."""

    def __init__(self, optimizers):
        super().__init__()
        self.automatic_optimization, self.count = False, optimizers

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(float(self.all_gather(loss.detach()).mean()))
        made = self.optimizers(use_pl_optimizer=True)
        made = made if isinstance(made, list) else [made]
        self.manual_backward(loss)
        for optimizer in made:
            optimizer.step()
        self.zero_grad()
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            scheduler.step()

    def configure_optimizers(self):
        parts = [self.blocks[0], self.blocks[1], self.blocks[2], self.head][: self.count]
        made = [torch.optim.AdamW(part.parameters(), lr=0.05) for part in parts]
        return (made, [torch.optim.lr_scheduler.StepLR(one, 1, 0.5) for one in made]) if made else None


def go_on(plan, count, path=None, save=None):
    """Losses of the steps from `path` on, and what is said of optimizers."""
    model = Several(count)
    run = trainer(
        LargeScaleStrategy(plan) if plan else "auto",
        devices=plan.world_size if plan else 1,
        max_steps=-1,
        max_epochs=2 if path else 1,
        limit_train_batches=STEPS,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, ckpt_path=path, weights_only=False)
    if save:
        run.save_checkpoint(save)
    return model.losses, [str(one.message) for one in caught if "configure_optimizers made" in str(one.message)]


PLANS = {
    "sharded": Plan(dp_shard=2),
    "replicated": Plan(dp_replicate=2),
    "divided": Plan(dp_shard=2, reshard_after_forward=False),
    "offloaded": Plan(offload_optimizer="cpu"),
    "plain": Plan(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of stock Lightning's for each number of optimizers."""
    folder = tmp_path_factory.mktemp("written")
    for count in range(4):
        go_on(None, count, save=folder / f"{count}.ckpt")
    # What stock Lightning writes of no optimizers it does not load into any.
    none = torch.load(folder / "0.ckpt", weights_only=False)
    torch.save({**none, "optimizer_states": []}, folder / "0.ckpt")
    return folder


COUNTS = [(1, 2), (3, 1), (0, 2), (2, 0)]
QUICK = {("sharded", 1, 2), ("sharded", 0, 2), *(("plain", *counts) for counts in COUNTS), ("replicated", 3, 1)}


@pytest.mark.parametrize(
    ("plan", "saved", "made"),
    [
        pytest.param(plan, *counts, marks=() if (plan, *counts) in QUICK else pytest.mark.slow)
        for plan in PLANS
        for counts in COUNTS
    ],
)
def test_loads_what_there_is(two, tmp_path, written, plan, saved, made):
    plan = PLANS[plan]
    call = two.run if plan.world_size > 1 else lambda *args: [args[0](*args[1:])]
    expected, _ = go_on(None, made, written / f"{saved}.ckpt")
    path = tmp_path / "own.ckpt"
    call(go_on, plan, saved, None, path)
    for source in (written / f"{saved}.ckpt", path):
        for rank, (losses, told) in enumerate(call(go_on, plan, made, source)):
            assert losses == pytest.approx(expected, rel=1e-5)
            assert len(told) == (rank == 0)
