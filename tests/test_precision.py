"""Precision: the plan's arithmetic, and no other by the Trainer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from models import Language, trainer
from ranks import quiet

from lightning_largescale.plan import Plan, PlanError
from lightning_largescale.precision import LargeScalePrecision, asked_precision, check_precision
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Noted(Language):
    """Notes dtypes as a block's matrix product and its norm see them."""

    def on_fit_start(self):
        block = self.blocks[0]
        self.seen = set()
        block.up.register_forward_hook(lambda part, x, y: self.seen.add(("up", part.weight.dtype, y.dtype)))
        block.norm.register_forward_hook(lambda part, x, y: self.seen.add(("norm", part.weight.dtype, y.dtype)))


def fit(plan, devices, asked=None):
    model = Noted()
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=4, precision=asked)
    given = run.precision_plugin
    run.fit(model)
    assert run.precision_plugin is given
    return model.losses, model.seen


@pytest.mark.parametrize(
    "plan",
    [
        Plan(precision="bf16-mixed", dp_shard=2),
        Plan(precision="bf16-mixed", dp_shard=2, reshard_after_forward=False, activation_checkpointing="full"),
        Plan(precision="bf16-mixed", dp_replicate=2),
    ],
)
def test_mixed_precision_trains_like_lightnings(two, plan):
    one, other = two.run(fit, plan, 2, "bf16-mixed")
    assert one == other
    expected, _ = fit(None, 1, "bf16-mixed")
    assert one[0] == pytest.approx(expected, rel=2e-3)
    gathered = torch.bfloat16 if plan.dp_shard > 1 else torch.float32
    assert one[1] == {("up", gathered, torch.bfloat16), ("norm", torch.float32, torch.float32)}


def test_plan_alone_decides():
    assert fit(Plan(precision="bf16-mixed"), 1)[0] == fit(None, 1, "bf16-mixed")[0]


def test_what_was_asked():
    assert asked_precision(Precision()) is None
    assert asked_precision(MixedPrecision("bf16-mixed", "cpu")) == "bf16-mixed"
    assert asked_precision(LargeScalePrecision("bf16-mixed", "cpu")) == "bf16-mixed"
    check_precision(None, Plan(precision="bf16-mixed"))
    check_precision("bf16-mixed", Plan(precision="bf16-mixed"))


class Own(Precision):
    pass


@pytest.mark.parametrize(
    ("plugin", "name"),
    [(HalfPrecision("bf16-true"), "bf16-true"), (DoublePrecision(), "64-true"), (Own(), "32-true")],
)
def test_other_plugins_are_refused(plugin, name):
    message = (
        rf"precision plugin is {type(plugin).__name__} \('{name}'\) and a plan trains in '32-true' or 'bf16-mixed'"
    )
    with pytest.raises(PlanError, match=message):
        asked_precision(plugin)


def test_contradiction():
    run = trainer(LargeScaleStrategy(Plan()), precision="bf16-mixed", max_steps=1)
    message = r"Trainer\(precision='bf16-mixed'\) contradicts the plan's precision='32-true'; give both the same"
    with pytest.raises(PlanError, match=message):
        run.fit(Language())
