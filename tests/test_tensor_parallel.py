"""Tensor parallel plans in the Trainer's hands, of models whose authors never thought of them."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from families import DECODERS, FAMILIES, Family
from lightning.pytorch import Callback
from models import CONTEXT, DIM, VOCAB, Language, Tokens, trainer
from ranks import quiet
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.full_params import make_whole
from lightning_largescale.parallel.order import divided_dims, full, order_of
from lightning_largescale.plan import Plan
from lightning_largescale.step_tracer import StepTracer
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = [
    *quiet,
    pytest.mark.filterwarnings("ignore:.*TypedStorage|.*enable_nested_tensor|.*`loss_type`"),
]

STEPS = 20
LAYOUTS = {
    "TP 4": Plan(tp=4),
    "TP 2 and ZeRO-3": Plan(tp=2, dp_shard=2),
    "TP 2 and replicate": Plan(tp=2, dp_replicate=2),
}


EVERY_DAY = {("gpt2", "TP 2 and ZeRO-3")}


def fit(name, plan, devices, steps=STEPS):
    """Losses, and the share of the parameters that is divided by tensor parallelism."""
    model = Family(name, seed=int(os.environ.get("RANK", 0)))
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=steps)
    run.fit(model)
    ways = plan.tp * plan.dp_shard if plan else 1
    divided = sum(one.numel() for one in model.parameters() if isinstance(one, DTensor) and is_tensor_parallel(one))
    for one in model.parameters():
        if isinstance(one, DTensor) and is_tensor_parallel(one):
            uneven = any(one.shape[dim] % ways for dim in divided_dims(one))
            assert one.to_local().numel() == one.numel() / ways or uneven
    return model.losses, divided / sum(one.numel() for one in model.parameters())


def is_tensor_parallel(parameter):
    return "tp" in (parameter.device_mesh.mesh_dim_names or ()) and len(divided_dims(parameter)) > 1


@cache
def plain(name):
    return fit(name, None, 1)[0]


def families(*everyday):
    """All families, those that are not for every day marked slow."""
    return [name if name in everyday else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", families("llama", "gpt2"))
def test_two_ranks_train_as_one(two, name):
    for losses, share in two.run(fit, name, Plan(tp=2), 2):
        assert losses == pytest.approx(plain(name), rel=1e-4)
        assert share >= (0.95 if name in DECODERS else 0.7), share


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if (name, layout) in EVERY_DAY else pytest.mark.slow)
        for name in FAMILIES
        for layout in LAYOUTS
    ],
)
def test_four_ranks_train_as_one(four, name, layout):
    for losses, _ in four.run(fit, name, LAYOUTS[layout], 4):
        assert losses == pytest.approx(plain(name), rel=1e-4)


@pytest.mark.parametrize("name", families("gpt2"))
def test_ranks_that_share_the_sequence_train_as_one(two, name):
    for losses, _ in two.run(fit, name, Plan(tp=2, sequence_parallel=True), 2):
        assert losses == pytest.approx(plain(name), rel=1e-4)


def gradients(name, plan, devices):
    """Whole gradients of the first step by name."""
    model = Family(name)
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=1, callbacks=[Gradients()])
    run.fit(model)
    return run.callbacks[0].found


class Gradients(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.found = {
            name: full(one.grad, order_of(one)).clone() if isinstance(one, DTensor) else one.grad.clone()
            for name, one in module.named_parameters()
            if one.grad is not None
        }


@pytest.mark.parametrize("plan", [Plan(tp=2), Plan(tp=2, sequence_parallel=True)], ids=["tp", "sequence"])
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", "attention"])
def test_gradients_of_the_first_step(two, name, plan):
    expected = gradients(name, None, 1)
    for found in two.run(gradients, name, plan, 2):
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, key


class Six(Language):
    """Blocks of six heads."""

    def __init__(self, heads=6):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM * 3, heads, DIM, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.embedding, self.position = nn.Embedding(VOCAB, DIM * 3), nn.Parameter(torch.zeros(CONTEXT, DIM * 3))
        self.norm, self.head = nn.LayerNorm(DIM * 3), nn.Linear(DIM * 3, VOCAB)


def refused(kind, plan, options=None, **run_options):
    """What a fit says that is refused, on each rank."""
    try:
        trainer(LargeScaleStrategy(plan, **(options or {})), devices=plan.world_size, max_steps=1, **run_options).fit(
            kind()
        )
    except PlanError as error:
        return str(error)
    return None


def test_heads_that_are_not_divisible(four):
    for message in four.run(refused, Six, Plan(tp=4)):
        assert message.startswith("tp=4 leaves ")
        assert "its outputs are 6 heads or stretches, of which 4 ranks cannot have whole ones" in message
        assert "the nearest that divides more is tp=3" in message


class Nothing(Language):
    """Has nothing that can be divided."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Softmax(-1)) for _ in range(2))


def test_compiled_blocks(two):
    for message in two.run(refused, Language, Plan(tp=2), {"compile": True}):
        assert message == "compile=True cannot be combined with tp=2; leave one of them out."


def twice(plan, devices):
    """Two modules by one Trainer, whose blocks have other names."""
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=3)
    losses = []
    for steps, name in ((3, "gpt2"), (6, "llama")):
        run.fit_loop.epoch_loop.max_steps = steps
        model = Family(name)
        run.fit(model)
        losses.append(model.losses)
    return losses


@pytest.mark.slow
def test_another_module_by_the_same_trainer(two):
    expected = twice(None, 1)
    for losses in two.run(twice, Plan(tp=2), 2):
        assert losses == [pytest.approx(of_one, rel=1e-4) for of_one in expected]


class CountsTraces(StepTracer):
    """Counts how often it traces a step."""

    traced = 0

    def trace(self, *args):
        self.traced += 1
        return super().trace(*args)


def twice_by_trainers(name):
    """How often each of two Trainers in turn traced one module, whole again in between, and of another later."""
    model, counts = Family(name), []
    for one in (model, model, Family(name)):
        strategy = LargeScaleStrategy(Plan(tp=2))
        strategy._tracer = CountsTraces(strategy)
        trainer(strategy, devices=2, max_steps=1).fit(one)
        make_whole(one)
        counts.append(strategy._tracer.traced)
    return counts


def test_a_module_is_traced_once_in_a_process(two):
    assert two.run(twice_by_trainers, "gpt2") == [[1, 0, 1]] * 2


def test_nothing_to_divide(two):
    for message in two.run(refused, Nothing, Plan(tp=2)):
        assert message.startswith(
            "tp=2 divides nothing of Nothing (blocks.0.0.weight: softmax would have to gather it)"
        )


class Styled(Language):
    """Knows how it is to be divided."""

    def __init__(self, styles=None):
        super().__init__()
        self.styles = styles or {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}

    def tensor_parallel_plan(self):
        return self.styles


def styled(plan=None, devices=1, **options):
    model = Styled()
    run = trainer(LargeScaleStrategy(plan, **options) if plan else "auto", devices=devices, max_steps=6)
    run.fit(model)
    placed = {name for name, one in model.named_parameters() if isinstance(one, DTensor) and is_tensor_parallel(one)}
    return model.losses, placed


def test_the_users_own_styles(two):
    expected, _ = styled()
    for losses, placed in two.run(styled, Plan(tp=2), 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert placed == {f"blocks.{n}.{part}" for n in range(3) for part in ("up.weight", "up.bias", "down.weight")}
    given = {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()}
    for losses, placed in two.run(styled, Plan(tp=2), 2, tensor_parallel_plan=given):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert placed == {"blocks.0.up.weight", "blocks.0.up.bias", "blocks.0.down.weight"}


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        (
            {"blocks.*.upp": ColwiseParallel()},
            "names 'blocks.*.upp' and Language has no such module; accepted are names",
        ),
        ({"blocks.*.up": "colwise"}, "has 'colwise' for 'blocks.*.up'; give an object of torch's ParallelStyle"),
        ({"blocks.*.norm": ColwiseParallel()}, "has ColwiseParallel for 'blocks.*.norm', which does not take it ("),
    ],
)
def test_styles_that_do_not_fit(two, styles, message):
    for found in two.run(refused, Language, Plan(tp=2), {"tensor_parallel_plan": styles}):
        assert found.startswith(f"tensor_parallel_plan {message}")


class OwnData(Language):
    """Every rank makes up its own batches."""

    def train_dataloader(self):
        rank = int(os.environ.get("RANK", 0))
        return DataLoader(torch.utils.data.Subset(Tokens(), range(rank * 16, rank * 16 + 16)), batch_size=8)


def test_ranks_that_are_given_different_batches(four):
    for message in four.run(refused, OwnData, Plan(tp=2, dp_shard=2)):
        assert "were given different batches and tp=2 has them compute the same samples" in message


def dropped(plan, devices):
    """Losses under dropout, and what each rank's generator gives afterwards; ranks seed theirs differently."""
    rank = int(os.environ.get("RANK", 0))
    model = Language(dropout=0.5)
    torch.manual_seed(rank)
    run = trainer(LargeScaleStrategy(plan), devices=devices, max_steps=3, callbacks=[Drawn()])
    run.fit(model)
    return model.losses, run.callbacks[0].drawn


class Drawn(Callback):
    def on_train_end(self, trainer, module):
        self.drawn = float(torch.rand(()))


def test_random_numbers_are_alike_where_samples_are(four):
    found = four.run(dropped, Plan(tp=2, dp_shard=2), 4)
    drawn = [number for _, number in found]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
    assert all(torch.isfinite(torch.tensor(losses)).all() for losses, _ in found)


def logits(plan, devices):
    """What a step returns that the ranks have in parts."""

    class Logits(Language):
        def predict_step(self, batch, index):
            return self.head(self(batch[:, :-1]))

    model = Logits()
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, limit_predict_batches=1)
    return run.predict(model)[0]


def test_what_a_step_returns_is_whole(two):
    expected = logits(None, 1)
    for found in two.run(logits, Plan(tp=2), 2):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Counting(Language):
    """Counts samples in a metric and in what it logs."""

    def __init__(self):
        super().__init__()
        self.seen = SumMetric()

    def validation_step(self, batch, index):
        self.loss(batch)
        self.seen.update(len(batch))
        self.log("seen", self.seen, on_epoch=True)
        self.log("counted", float(len(batch)), reduce_fx="sum", sync_dist=True)


def counted(plan, devices):
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, limit_val_batches=None)
    run.validate(Counting(), verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("plan", [Plan(tp=2, dp_shard=2), Plan(tp=2, dp_replicate=2)], ids=["sharded", "replicated"])
def test_each_sample_counts_once(four, plan):
    assert four.run(counted, plan, 4) == [{"seen": 160, "counted": 160}] * 4


def saved(plan, devices, path):
    model = Family("gpt2")
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=2)
    run.fit(model)
    run.save_checkpoint(path)
    return model.losses


def resumed(plan, devices, path):
    model = Family("gpt2", seed=5)
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=5)
    run.fit(model, ckpt_path=path)
    return model.losses


@pytest.mark.slow
def test_checkpoints_of_matrices_in_another_order(two, tmp_path):
    """A fused q, k and v is divided in stretches; a checkpoint has it as the user has."""
    path = str(tmp_path / "divided.ckpt")
    by_one = str(tmp_path / "plain.ckpt")
    expected = saved(None, 1, by_one)
    for losses in two.run(saved, Plan(tp=2), 2, path):
        assert losses == pytest.approx(expected, rel=1e-4)
    expected = resumed(None, 1, by_one)
    assert resumed(None, 1, path) == pytest.approx(expected, rel=1e-4)
    for plan in (Plan(tp=2), Plan(dp_shard=2)):
        for losses in [*two.run(resumed, plan, 2, path), *two.run(resumed, plan, 2, by_one)]:
            assert losses == pytest.approx(expected, rel=1e-4)
