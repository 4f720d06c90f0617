"""Sharded modules made whole: full parameters for a block of code, and for good."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from models import Language, trainer
from ranks import in_own_group, quiet
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_largescale import LargeScaleAutoStrategy, LargeScaleStrategy, Plan, PlanError
from lightning_largescale.parallel.full_params import make_whole
from lightning_largescale.parallel.sharded import sharded_state

pytestmark = quiet

PLANS = [
    Plan(dp_shard=2),
    pytest.param(Plan(dp_shard=2, reshard_after_forward=False), marks=pytest.mark.slow),
    Plan(dp_shard=2, activation_checkpointing="full"),
    Plan(dp_replicate=2),
]
THREE = PLANS[0]


def strategy_of(plan):
    return LargeScaleStrategy(plan) if plan else "auto"


def full(model):
    return {
        name: value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()
        for name, value in model.state_dict().items()
    }


class Reader(Callback):
    """Reads, evaluates and edits the whole module between steps."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step != 2:
            return
        read = getattr(trainer.strategy, "full_parameters", torch.no_grad)
        tokens = torch.arange(8, device=module.device)[None] % 32
        with read(), torch.no_grad():
            assert not any(
                isinstance(value, DTensor) for value in (*module.parameters(), *module.state_dict().values())
            )
            assert module.head.weight is module.embedding.weight
            self.seen.append(module(tokens).clone())
            self.seen.append(module.state_dict()["blocks.1.up.weight"].clone())
            module.blocks[0].up.weight.mul_(0.5)
            module.position[3] = 0.25
            module.norm.bias.data = module.norm.bias.data + 0.125
            self.seen.append(module(tokens).clone())
        if read is not torch.no_grad and sharded_state(module):
            assert isinstance(module.blocks[0].up.weight, DTensor)


def read_and_edit(plan, devices, **options):
    model, reader = Language(tied=True), Reader()
    trainer(strategy_of(plan), devices=devices, callbacks=[reader], **{"max_steps": 5, **options}).fit(model)
    return reader.seen, model.losses


@pytest.mark.parametrize("plan", PLANS)
def test_full_parameters_are_read_computed_with_and_written(two, plan):
    seen, losses = read_and_edit(None, 1)
    for found, trained in two.run(read_and_edit, plan, 2):
        torch.testing.assert_close(found, seen, rtol=1e-4, atol=1e-6)
        assert trained == pytest.approx(losses, rel=1e-5)


class Penalised(Language):
    """A loss of all parameters, as written before or after the forward, in the whole model or as plain code has it."""

    def __init__(self, *, early, asking=True):
        super().__init__()
        self.early, self.asking = early, asking

    def penalty(self):
        return sum(parameter.square().sum() for parameter in self.parameters())

    def loss(self, batch):
        if not self.training:
            return super().loss(batch)
        read = (
            getattr(self.trainer.strategy, "full_parameters", torch.enable_grad) if self.asking else torch.enable_grad
        )
        if self.early:
            with read():
                penalty = self.penalty()
            return super().loss(batch) + 1e-3 * penalty
        loss = super().loss(batch)
        with read():
            return loss + 1e-3 * self.penalty()


def penalise(plan, devices, early, asking=True, **options):
    model = Penalised(early=early, asking=asking)
    trainer(strategy_of(plan), devices=devices, **{"max_steps": 6, **options}).fit(model)
    return model.losses


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", PLANS)
def test_a_loss_of_full_parameters_is_differentiated(two, plan, early):
    plain = penalise(None, 1, early, accumulate_grad_batches=2)
    for losses in two.run(penalise, plan, 2, early, accumulate_grad_batches=2):
        assert losses == pytest.approx(plain, rel=1e-5)


ELSEWHERE = {
    "DRAM": {"offload_parameters": "cpu"},
    "DRAM in part": {"offload_parameters": "cpu", "resident_parameter_bytes": 8000},
    "disk": {"offload_parameters": "nvme"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("fields", ELSEWHERE.values(), ids=ELSEWHERE)
def test_full_parameters_are_on_the_device_that_computes(tmp_path, fields):
    plan, options = Plan(nvme_path=str(tmp_path), **fields), {"accelerator": "cuda", "max_steps": 3}
    (seen, losses), (expected, plain) = (read_and_edit(one, 1, **options) for one in (plan, Plan()))
    torch.testing.assert_close(seen, expected)
    assert losses == pytest.approx(plain, rel=1e-5)
    early = "resident_parameter_bytes" in fields
    found, plain = (penalise(one, 1, early, **options) for one in (plan, Plan()))
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
def test_full_parameters_of_two_ranks_are_on_each_ones_device(two):
    plans = Plan(dp_shard=2, offload_parameters="cpu"), Plan(dp_shard=2)
    options = {"accelerator": "cuda", "max_steps": 3}
    found, expected = (two.run(in_own_group, penalise, plan, 2, True, **options) for plan in plans)
    assert found == [pytest.approx(losses, rel=1e-5) for losses in expected]


class Norm(Penalised):
    """The loss that shards are added to is a DTensor too, which nothing complains of."""

    def training_step(self, batch, index):
        return Language.loss(self, batch) + self.penalty()


def fit_norm(plan):
    trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(Norm(early=False))


def test_a_loss_that_is_a_shard_is_answered_too(two):
    with pytest.raises(PlanError, match=r"divided; .*its result is a DTensor"):
        two.run(fit_norm, THREE)


def test_a_loss_of_shards_is_answered_with_what_to_do(two):
    with pytest.raises(
        PlanError, match=r"training_step computed .* divided; .* `with self.trainer.strategy.full_parameters\(\):"
    ):
        two.run(penalise, THREE, 2, early=False, asking=False)


def fits(plans, devices, tied=False):
    """One fit after the other, and what the weights are at the end."""
    model = Language(tied=tied, frozen=True)
    kind = type(model)
    for plan in plans:
        strategy = LargeScaleAutoStrategy() if plan == "auto" else strategy_of(plan)
        trainer(strategy, devices=devices, max_steps=3, limit_val_batches=1, val_check_interval=3).fit(model)
    divided = sharded_state(model) is not None
    assert divided == any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert type(model) is kind or divided
    return model.losses + model.evaluated, full(model)


@pytest.mark.parametrize(
    "plans",
    [
        [THREE, Plan(dp_replicate=2)],
        pytest.param([THREE, Plan(dp_shard=2, precision="bf16-mixed"), THREE], marks=pytest.mark.slow),
        pytest.param([Plan(dp_replicate=2), THREE, Plan(dp_replicate=2), THREE], marks=pytest.mark.slow),
        [THREE, "auto"],
    ],
    ids=str,
)
def test_a_second_trainer_with_another_plan_goes_on(two, plans):
    losses, weights = fits([None] * len(plans), 1)
    mixed = any(getattr(plan, "precision", "") == "bf16-mixed" for plan in plans)
    for found, divided in two.run(fits, plans, 2):
        assert found == pytest.approx(losses, rel=2e-2 if mixed else 1e-5)
        assert divided.keys() == weights.keys()


@pytest.mark.slow
def test_from_and_to_hybrid_sharding(four):
    losses, _ = fits([None, None, None], 1)
    for found, _ in four.run(fits, [Plan(dp_replicate=2, dp_shard=2), Plan(dp_shard=4), Plan(dp_replicate=4)], 4):
        assert found == pytest.approx(losses, rel=1e-5)


def whole_for_good():
    model = Language(tied=True)
    model.temperature = nn.Parameter(torch.ones(()))
    run = trainer(LargeScaleStrategy(THREE), devices=2, max_steps=2)
    run.fit(model)
    before = full(model)
    run.strategy.make_whole()
    after = dict(model.state_dict())
    assert type(model) is Language
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert all(torch.equal(after[name], value) for name, value in before.items())
    make_whole(model)
    if torch.distributed.get_rank() == 0:
        model.temperature.sum().backward()
    # Alone now: nothing of this is a collective.
    trainer(max_steps=4).fit(model)
    return model.losses


def test_whole_for_good(two):
    first, second = two.run(whole_for_good)
    assert len(first) == 6
    assert first == pytest.approx(second)


def alone_after():
    model = Language()
    trainer(LargeScaleStrategy(THREE), devices=2, max_steps=2).fit(model)
    trainer(LargeScaleStrategy(Plan()), devices=1, max_steps=2).fit(model)


def test_a_trainer_of_fewer_devices_is_told_to_make_it_whole(two):
    message = (
        r"Language is divided among 2 processes and this Trainer has 1; first call `trainer.strategy.make_whole\(\)`"
    )
    with pytest.raises(PlanError, match=message):
        two.run(alone_after)
