"""The strategy in the Trainer's hands: plans train as one plain process does, on 1, 2 and 4 processes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import warnings
from functools import cache
from unittest import mock

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.strategies import Strategy
from models import Block, Language, trainer
from ranks import quiet
from torch import nn
from torch.utils.data import DataLoader

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = {
    "replicate": lambda world: Plan(dp_replicate=world),
    "ZeRO-2": lambda world: Plan(dp_shard=world, reshard_after_forward=False),
    "ZeRO-3": lambda world: Plan(dp_shard=world),
    "HSDP": lambda world: Plan(dp_replicate=2, dp_shard=world // 2),
    "TP": lambda world: Plan(tp=world),
    "TP and ZeRO-3": lambda world: Plan(dp_shard=world // 2, tp=2),
    "TP and replicate": lambda world: Plan(dp_replicate=world // 2, tp=2, reshard_after_forward=False),
}
# Two replicas of two parts are four processes.
OF_FOUR = ("HSDP", "TP and ZeRO-3", "TP and replicate")
# What is trained in what way: options of the model and of the Trainer.
CASES = {
    "simple": ({}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "clipping": ({}, {"gradient_clip_val": 0.1}),
    "tied": ({"tied": True}, {"gradient_clip_val": 0.1}),
    "frozen": ({"frozen": True}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
}


@pytest.fixture(params=["two", "four"])
def world(request):
    return request.getfixturevalue(request.param)


def fit(plan, devices, case, **options):
    """Losses of 20 steps; ranks other than 0 build other weights, which must not matter."""
    model_options, trainer_options = CASES[case]
    model = Language(seed=int(os.environ.get("RANK", 0)), **model_options)
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, **trainer_options)
    run.fit(model)
    return model.losses


@cache
def plain(case):
    return fit(None, 1, case)


def assert_parity(losses, expected):
    assert len(losses) == len(expected)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def parity_cases():
    """For every day every plan without tensor parallelism, every case, but not all of all."""
    plans, cases = [*PLANS], [*CASES]
    for number, (plan, case) in enumerate(itertools.product(PLANS, CASES)):
        for size, recompute in itertools.product(("two", "four"), ("none", "full")):
            if size == "two" and plan in OF_FOUR:
                continue
            usual = "four" if plan in OF_FOUR or (plan, case) == ("ZeRO-3", "clipping") else "two"
            everyday = size == usual and recompute == ["none", "full"][number % 2]
            # Every second pair has every plan and every case.
            everyday &= (plans.index(plan) + cases.index(case)) % 2 == 0
            # Of tensor parallelism there are tests of their own; four ranks take long.
            everyday &= "TP" not in plan and (plan, case) != ("HSDP", "tied")
            yield pytest.param(size, plan, case, recompute, marks=() if everyday else pytest.mark.slow)


@pytest.mark.parametrize(("world", "plan", "case", "recompute"), list(parity_cases()), indirect=["world"])
def test_trains_like_one_plain_process(world, plan, case, recompute):
    layout = PLANS[plan](world.size)
    chosen = dataclasses.replace(layout, activation_checkpointing=recompute)
    for losses in world.run(fit, chosen, world.size, case):
        assert_parity(losses, plain(case))


@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"dp_replicate": 2}], ids=["ZeRO-3", "replicate"])
def test_some_blocks_recompute(two, layout):
    chosen = Plan(**layout, activation_checkpointing="selective", checkpointed_blocks=("blocks.1",))
    for losses in two.run(fit, chosen, 2, "simple"):
        assert_parity(losses, plain("simple"))


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2},
        pytest.param({"dp_replicate": 2}, marks=pytest.mark.slow),
        {"tp": 2},
        pytest.param({"tp": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["ZeRO-3", "replicate", "TP", "sequence"],
)
def test_what_is_cheap_recomputes(two, layout):
    chosen = Plan(**layout, activation_checkpointing="full", checkpointed_operations="cheap")
    for losses in two.run(fit, chosen, 2, "clipping"):
        assert_parity(losses, plain("clipping"))


WRAPPED = {"extra_fsdp_modules": ("embedding", "head")}


@pytest.mark.parametrize(
    "case", ["clipping", *(pytest.param(case, marks=pytest.mark.slow) for case in ("accumulation", "frozen"))]
)
@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2},
        pytest.param({"dp_shard": 2, "reshard_after_forward": False}, marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2, "activation_checkpointing": "full"}, marks=pytest.mark.slow),
        {"tp": 2},
    ],
    ids=["ZeRO-3", "ZeRO-2", "full", "TP"],
)
def test_embedding_and_head_gathered_by_themselves(two, layout, case):
    for losses in two.run(fit, Plan(**layout, **WRAPPED), 2, case):
        assert_parity(losses, plain(case))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP and ZeRO-3", "HSDP"])
def test_embedding_and_head_gathered_by_themselves_on_four_ranks(four, layout):
    for losses in four.run(fit, dataclasses.replace(PLANS[layout](4), **WRAPPED), 4, "clipping"):
        assert_parity(losses, plain("clipping"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_process_trains_like_lightning_bit_for_bit(case, recompute):
    assert fit(Plan(activation_checkpointing=recompute), 1, case) == plain(case)


def life(plan, devices):
    """Every stage, alone and after one another, by one trainer and by others."""
    model = Language(seed=int(os.environ.get("RANK", 0)))
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    run = trainer(strategy, devices=devices, max_steps=6, val_check_interval=2, limit_val_batches=3)
    run.validate(model, verbose=False)
    run.fit(model)
    run.validate(model, verbose=False)
    run.test(model, verbose=False)
    metric = float(run.callback_metrics["val_loss"])
    predicted = run.predict(model)
    for again in range(2):
        strategy = LargeScaleStrategy(plan) if plan else "auto"
        other = trainer(strategy, devices=devices, max_steps=3)
        other.test(model, verbose=False) if again else other.fit(model)
    assert run.model is model
    assert list(model.state_dict()) == list(Language().state_dict())
    return model.losses + model.evaluated, len(predicted), metric


@pytest.mark.parametrize(
    "plan",
    [
        *(PLANS[name](2) for name in ("ZeRO-3", "replicate", "TP")),
        pytest.param(PLANS["ZeRO-2"](2), marks=pytest.mark.slow),
        pytest.param(Plan(dp_shard=2, **WRAPPED), marks=pytest.mark.slow),
    ],
)
def test_every_stage_by_itself_and_after_others(two, plan):
    losses, predicted, metric = life(None, 1)
    for found, number, logged in two.run(life, plan, 2):
        assert found == pytest.approx(losses, rel=1e-5)
        assert number == predicted
        assert logged == pytest.approx(metric, rel=1e-5)


def boring(plan, devices):
    torch.manual_seed(0)
    model = BoringModel()
    run = trainer(
        LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=4, limit_val_batches=2, max_epochs=1
    )
    run.fit(model)
    for evaluate in (run.validate, run.test):
        evaluate(model, verbose=False)
    run.predict(model, dataloaders=DataLoader(RandomDataset(32, 8)))
    weight = model.layer.weight.detach()
    return getattr(weight, "full_tensor", lambda: weight)()


@pytest.mark.parametrize("plan", [PLANS["ZeRO-3"](2), PLANS["ZeRO-2"](2), PLANS["replicate"](2)])
def test_lightnings_own_model(two, plan):
    for weight in two.run(boring, plan, 2):
        torch.testing.assert_close(weight, boring(None, 1))


class Built(Language):
    def __init__(self):
        super().__init__(seed=None)
        self.kept = self._modules.pop("blocks")
        self.blocks = None

    def configure_model(self):
        if self.blocks is None:
            torch.manual_seed(int(os.environ.get("RANK", 0)))
            self.blocks = nn.ModuleList(Block() for _ in range(3))


def build(plan, devices):
    torch.manual_seed(3)
    model = Built()
    trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=6).fit(model)
    return model.losses


def test_configure_model(two):
    for losses in two.run(build, Plan(dp_shard=2), 2):
        assert losses == pytest.approx(build(None, 1), rel=1e-5)


class Normalised(Language):
    """Blocks with running statistics; with `fixed` they are used and not gathered, as in fine-tuning."""

    def __init__(self, *, fixed=False):
        super().__init__()
        self.fixed = fixed
        self.blocks = nn.ModuleList(nn.Sequential(Block(), nn.BatchNorm1d(8)) for _ in range(3))

    def on_train_batch_start(self, batch, index):
        for part in self.modules():
            if isinstance(part, nn.BatchNorm1d | nn.SyncBatchNorm):
                part.train(not self.fixed)

    def on_train_end(self):
        self.train()


def statistics(plan, devices):
    model = Normalised()
    trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=4).fit(model)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_running_statistics_under_recomputation_are_those_of_a_plain_run():
    plain = statistics(None, 1)
    recomputed = statistics(Plan(activation_checkpointing="full"), 1)
    assert plain["blocks.0.1.num_batches_tracked"] == 4
    assert all(torch.equal(recomputed[name], buffer) for name, buffer in plain.items())


def synchronised(plan, devices):
    """Losses and what another trainer evaluates after; on CPU synchronised layers can only be evaluated."""
    model = Normalised(fixed=True)
    for _ in range(2):
        strategy = LargeScaleStrategy(plan) if plan else "auto"
        trainer(strategy, devices=devices, max_steps=2, sync_batchnorm=devices > 1).fit(model)
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    trainer(strategy, devices=devices, limit_val_batches=2).validate(model, verbose=False)
    return model.losses + model.evaluated


def test_synchronised_batch_normalisation(two):
    for losses in two.run(synchronised, Plan(dp_shard=2), 2):
        assert losses == pytest.approx(synchronised(None, 1), rel=1e-5)


def hardware_plan(hardware):
    return Plan(dp_shard=hardware.world_size)


def by_function(precision):
    strategy = LargeScaleStrategy(hardware_plan)
    trainer(strategy, devices=2, max_steps=1, precision=precision).fit(Language())
    return strategy.plan


def test_a_function_of_the_hardware_gives_the_plan_and_the_trainer_its_precision(two):
    assert two.run(by_function, None) == [Plan(dp_shard=2)] * 2
    assert two.run(by_function, "bf16-mixed") == [Plan(dp_shard=2, precision="bf16-mixed")] * 2


def test_plan_of_a_file_a_mapping_and_nothing(tmp_path):
    plan = Plan(activation_checkpointing="full")
    plan.save(tmp_path / "plan.json")
    given = [tmp_path / "plan.json", str(tmp_path / "plan.json"), {"activation_checkpointing": "full"}, plan]
    assert [LargeScaleStrategy(one).plan for one in given] == [plan] * 4
    with pytest.raises(PlanError, match="plan=3 is no plan; give a Plan, a mapping of its fields, or the path"):
        LargeScaleStrategy(3)
    with pytest.raises(PlanError, match="dp_shards=2 is no field of a Plan"):
        LargeScaleStrategy({"dp_shards": 2})


@pytest.mark.parametrize(("plan", "devices"), [(Plan(dp_shard=3), 2), (Plan(), 2), (Plan(dp_shard=2), 1)])
def test_sizes_that_do_not_multiply_to_the_processes(plan, devices):
    there = "are 2 processes" if devices == 2 else "is 1 process"
    found, wanted = f"dp_shard={plan.dp_shard}, tp=1 makes {plan.dp_shard}", rf"for example dp_shard={devices}\."
    message = f"{found} and there {there}; .* {wanted}"
    with pytest.raises(PlanError, match=message):
        trainer(LargeScaleStrategy(plan), devices=devices)


class Empty(BoringModel):
    def __init__(self):
        super().__init__()
        del self.layer


class Untrained(BoringModel):
    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize("module", [Empty, Untrained])
def test_nothing_to_train_is_left_to_lightning(module):
    model = module()
    if module is Empty:
        model.training_step = lambda batch, batch_idx: torch.zeros((), requires_grad=True)
        model.configure_optimizers = lambda: None
    run = trainer(LargeScaleStrategy(Plan()), max_epochs=1, limit_train_batches=3)
    run.fit(model)
    assert run.fit_loop.epoch_loop.total_batch_idx == 2


def fit_empty():
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=1).fit(Empty())


def test_nothing_to_divide(two):
    with pytest.raises(PlanError, match="Empty has no parameters to divide; give it at least one, or use dp_replicate"):
        two.run(fit_empty)


class Skips(Language):
    """Leaves a step out, as Lightning allows on one process."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return None if index == 1 else loss


def skip(strategy, devices):
    model = Skips()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`training_step` returned `None`")
        try:
            trainer(strategy, devices=devices, max_steps=4).fit(model)
        except Exception as error:
            return str(error)
    return model.losses


@pytest.mark.parametrize("kind", [LargeScaleStrategy, LargeScaleAutoStrategy])
def test_a_training_step_that_returns_none(two, kind):
    def strategy(world):
        return kind(Plan(dp_shard=world)) if kind is LargeScaleStrategy else kind()

    assert skip(strategy(1), 1) == skip("auto", 1)
    for told in two.run(skip, strategy(2), 2):
        assert "returning None in distributed training is not supported" in told


def test_ranks_as_forks_hand_the_trained_weights_back(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    model = Language(tied=True)
    start = copy.deepcopy(model)
    # Decided in the ranks, and known here after.
    strategy = LargeScaleStrategy(hardware_plan, start_method="fork")
    run = trainer(strategy, devices=2, max_steps=3)
    run.fit(model)
    trainer(max_steps=3).fit(start)
    assert type(model.head.weight) is nn.Parameter
    assert model.head.weight is model.embedding.weight
    assert run.strategy.plan == Plan(dp_shard=2)
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-3, atol=2e-3)


def test_a_plain_run_has_lightnings_own_backward():
    """As those who wrap it on its class expect."""
    module, run = Language(), trainer(LargeScaleStrategy(Plan()))
    with mock.patch.object(Strategy, "backward", wraps=run.strategy.backward) as called:
        run.fit(module)
    assert called.call_count == len(module.losses) > 0
