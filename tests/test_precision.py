"""Precision: every arithmetic trains as Lightning's own plugin has it; a plugin of the user's is obeyed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from models import Language, trainer
from ranks import quiet
from torch import nn

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.precision import asked_precision, check_precision, convert_module
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE

pytestmark = quiet

PLANS = {
    "replicate": {"dp_replicate": 2},
    "ZeRO-2": {"dp_shard": 2, "reshard_after_forward": False, "activation_checkpointing": "full"},
    "ZeRO-3": {"dp_shard": 2},
    "wrapped": {"dp_shard": 2, "extra_fsdp_modules": ["embedding", "head"]},
}
# Two processes add in another order: within an unit in the last place of each type, drawn out by four steps.
CLOSE = {"32-true": 1e-5, "64-true": 1e-6, "bf16-mixed": 2e-3, "16-mixed": 2e-4, "bf16-true": 5e-3, "16-true": 1e-3}


class Noted(Language):
    """Notes dtypes as a block's matrix product and its norm see them."""

    def on_fit_start(self):
        block = self.blocks[0]
        self.seen = set()
        block.up.register_forward_hook(lambda part, x, y: self.seen.add(("up", part.weight.dtype, y.dtype)))
        block.norm.register_forward_hook(lambda part, x, y: self.seen.add(("norm", part.weight.dtype, y.dtype)))

    def configure_optimizers(self):
        # Adam's divisor is 0 in float16.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def options(precision):
    """What a user gives the Trainer, which takes "16-mixed" on the CPU only as a plugin."""
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    return {"precision": precision}


def fit(plan, devices, asked=None, strategy=LargeScaleStrategy):
    model = Noted()
    given = options(asked) if asked else {}
    run = trainer(strategy(plan) if plan else "auto", devices=devices, max_steps=4, gradient_clip_val=0.5, **given)
    plugin, content = run.precision_plugin, {**vars(run.precision_plugin)}
    run.fit(model)
    assert run.precision_plugin is plugin
    assert vars(plugin) == content
    return model.losses, model.seen


@pytest.mark.parametrize("precision", MATMUL_TYPE)
def test_one_process_trains_as_lightnings_plugin_bit_for_bit(precision):
    expected = fit(None, 1, precision)
    assert fit(Plan(precision=precision), 1, precision) == expected
    assert fit(Plan(precision=precision), 1) == expected


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        pytest.param(
            precision,
            layout,
            marks=() if layout == "ZeRO-3" or (precision, layout) == ("bf16-mixed", "replicate") else pytest.mark.slow,
        )
        for precision in MATMUL_TYPE
        for layout in PLANS
    ],
)
def test_two_processes_train_as_lightnings_plugin(two, precision, layout):
    expected, seen = fit(None, 1, precision)
    plan = Plan(precision=precision, **PLANS[layout])
    one, other = two.run(fit, plan, 2)
    assert one == other
    assert one[0] == pytest.approx(expected, rel=CLOSE[precision])
    if precision.endswith("mixed") and plan.dp_shard > 1:
        # What is cast for each product is gathered so.
        seen = {(part, made if part == "up" else weight, made) for part, weight, made in seen}
    assert one[1] == seen


@pytest.mark.slow
@pytest.mark.parametrize("precision", MATMUL_TYPE)
def test_hybrid_sharding_trains_as_lightnings_plugin(four, precision):
    expected, _ = fit(None, 1, precision)
    for losses, _ in four.run(fit, Plan(precision=precision, dp_replicate=2, dp_shard=2), 4):
        assert losses == pytest.approx(expected, rel=CLOSE[precision])


class Late(Noted):
    """Builds what it trains in `configure_model`."""

    def __init__(self):
        super().__init__()
        self.built = None

    def configure_model(self):
        if self.built is None:
            torch.manual_seed(5)
            self.built = nn.Linear(16, 16)

    def forward(self, tokens):
        return self.built(super().forward(tokens))


def late(strategy, **given):
    model = Late()
    trainer(strategy, max_steps=2, **given).fit(model)
    return model.losses, model.built.weight.dtype


def test_configure_model_builds_in_the_plans_precision():
    expected = late("auto", precision="bf16-true")
    assert expected[1] == torch.bfloat16
    assert late(LargeScaleStrategy(Plan(precision="bf16-true"))) == expected


def auto(devices, precision):
    model = Noted()
    run = trainer(LargeScaleAutoStrategy(), devices=devices, max_steps=2, gradient_clip_val=0.5, **options(precision))
    run.fit(model)
    return run.strategy.plan, run.strategy.report.workload, model.losses


@pytest.mark.parametrize(
    ("precision", "share"), [("bf16-true", 0.5), ("16-true", 0.5), ("64-true", 2), ("16-mixed", 1)]
)
def test_auto_traces_what_will_run(precision, share):
    plan, workload, losses = auto(1, precision)
    assert plan.precision == precision
    assert [*workload.steps] == [precision]
    size = sum(parameter.numel() for parameter in Language().parameters())
    assert workload.parameter_bytes == 4 * share * size
    assert losses == fit(None, 1, precision)[0][:2]


def test_auto_on_two_processes(two):
    (plan, _, one), (_, _, other) = two.run(auto, 2, "bf16-true")
    assert plan.precision == "bf16-true"
    assert one == other


def test_what_was_asked():
    assert asked_precision(Precision()) is None
    for plugin in (HalfPrecision("bf16-true"), DoublePrecision(), MixedPrecision("bf16-mixed", "cpu"), Own()):
        assert asked_precision(plugin) == plugin.precision
    check_precision(None, Plan(precision="bf16-mixed"))
    check_precision("bf16-mixed", Plan(precision="bf16-mixed"))


class Own(Precision):
    """Computes in bfloat16 by itself and halves what it clips to; notes which of its methods were called."""

    def __init__(self):
        self.called = []

    def convert_module(self, module):
        self.called.append("convert_module")
        return module.double()

    def convert_input(self, data):
        self.called.append("convert_input")
        return data

    @contextmanager
    def forward_context(self):
        self.called.append("forward_context")
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            yield

    @contextmanager
    def train_step_context(self):
        self.called.append("train_step_context")
        with self.forward_context():
            yield

    def pre_backward(self, tensor, module):
        self.called.append("pre_backward")
        return super().pre_backward(tensor * 2, module)

    def post_backward(self, tensor, module):
        self.called.append("post_backward")
        return super().post_backward(tensor, module) / 2

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        self.called.append("optimizer_step")
        return super().optimizer_step(optimizer, model, closure, **kwargs)


class OwnClipping(Own):
    """Clips to half of what was asked."""

    def clip_grad_by_norm(self, optimizer, clip_val):
        self.called.append("clip_grad_by_norm")
        super().clip_grad_by_norm(optimizer, clip_val / 2)


def fit_own(plan, devices, kind):
    model, plugin = Noted(), kind()
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    trainer(strategy, devices=devices, max_steps=3, gradient_clip_val=0.1, plugins=[plugin]).fit(model)
    return model.losses, model.seen, plugin.called


@pytest.mark.parametrize("kind", [Own, OwnClipping])
@pytest.mark.parametrize("layout", ["replicate", "ZeRO-3"])
def test_a_plugin_of_the_users_is_obeyed(two, kind, layout):
    expected = fit_own(None, 1, kind)
    assert fit_own(Plan(), 1, kind) == expected
    for losses, seen, called in two.run(fit_own, Plan(**PLANS[layout]), 2, kind):
        assert losses == pytest.approx(expected[0], rel=2e-3)
        assert seen == expected[1]
        assert called == expected[2]


class Renamed(Precision):
    precision = "fp8"


@pytest.mark.parametrize(
    "plugin",
    [
        Renamed(),
        TransformerEnginePrecision.__new__(TransformerEnginePrecision),
        BitsandbytesPrecision.__new__(BitsandbytesPrecision),
    ],
)
def test_other_plugins_are_refused(plugin):
    message = (
        rf"precision plugin is {type(plugin).__name__} \('[a-z0-9-]+'\), and a plan trains in '32-true', 'bf16-mixed',"
        r" .*; give one of these as Trainer\(precision=...\), or a plugin of your own whose precision is one of them"
    )
    with pytest.raises(PlanError, match=message):
        asked_precision(plugin)


def test_a_plugin_that_makes_another_module():
    class Wrapping(Precision):
        def convert_module(self, module):
            return nn.Sequential(module)

    with pytest.raises(PlanError, match=r"Wrapping.convert_module returned another module than it was given; change"):
        convert_module(Wrapping(), nn.Linear(1, 1))


@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "64-true"])
def test_contradiction(asked):
    run = trainer(LargeScaleStrategy(Plan()), precision=asked, max_steps=1)
    message = rf"Trainer\(precision='{asked}'\) contradicts the plan's precision='32-true'; give both the same"
    with pytest.raises(PlanError, match=message):
        run.fit(Language())


@pytest.mark.parametrize("strategy", [LargeScaleAutoStrategy, lambda: LargeScaleStrategy(Plan())], ids=["auto", "own"])
def test_a_plugin_converts_once_a_fit(strategy):
    plugin, model = Own(), Language().double()
    for fit in (1, 2):
        trainer(strategy(), max_steps=1, plugins=[plugin]).fit(model)
        assert plugin.called.count("convert_module") == fit


class Bare(LightningModule):
    def validation_step(self, batch, index):
        self.log("sum", batch.sum())


def test_a_module_without_parameters_has_the_precision_that_was_asked_for():
    run = trainer(LargeScaleAutoStrategy(), precision="bf16-mixed", limit_val_batches=1)
    run.validate(Bare(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2), verbose=False)
    assert run.strategy.plan.precision == "bf16-mixed"
    assert run.callback_metrics["sum"] == 4
