"""Lightning's BatchSizeFinder, LearningRateFinder and Tuner on several ranks."""

from __future__ import annotations

import copy
import os
import resource
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from models import Language, Tokens, trainer
from ranks import quiet, ranks
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = {
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
}
# What torch says where malloc fails; Lightning looks for it.
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8192 bytes."


class Sized(Language):
    """Has a batch size to find; a batch above `limit` on rank `short` runs out of memory at `place` of a step."""

    def __init__(self, *, batch_size=2, limit=10**9, short=1, place="forward", **options):
        super().__init__(**options)
        self.batch_size, self.limit, self.short, self.place = batch_size, limit, short, place
        self.sizes: list[int] = []
        block = self.blocks[1]
        block.register_forward_pre_hook(lambda block, inputs: self.run_out("forward", inputs[0]))
        block.down.register_full_backward_pre_hook(lambda part, gradients: self.run_out("backward", gradients[0]))

    def run_out(self, place, tensor):
        stage = "forward" if self.place == "validation" and self.trainer.evaluating else self.place
        if place == stage and len(tensor) > self.limit and self.global_rank == self.short:
            raise RuntimeError(NO_MEMORY)

    def training_step(self, batch, index):
        self.sizes.append(len(batch))
        return super().training_step(batch, index)

    def configure_optimizers(self):
        """An optimizer that has stepped, so that there is a state to keep."""
        optimizer = super().configure_optimizers()
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def on_fit_start(self):
        # Callbacks have searched by now.
        self.losses.clear()

    def loader(self):
        data = Tokens(self.samples)
        sampler = None
        if self.trainer.world_size > 1:
            sampler = DistributedSampler(data, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def local(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def tensors(run, module):
    """Weights and optimizer state, as far as they are this rank's."""
    state = run.optimizers[0].state_dict()["state"]
    moments = [state[index][name] for index in sorted(state) for name in sorted(state[index])]
    assert len(moments) == 3 * len(list(module.parameters()))
    return [local(tensor) for tensor in (*module.state_dict().values(), *moments)]


class Around(Callback):
    """Keeps what a search must leave as it was."""

    def on_fit_start(self, run, module):
        self.tensors, self.groups = tensors(run, module), copy.deepcopy(run.optimizers[0].param_groups)

    def check(self, run, module):
        assert all(torch.equal(now, before) for now, before in zip(tensors(run, module), self.tensors, strict=True))
        for now, before in zip(run.optimizers[0].param_groups, self.groups, strict=True):
            assert {**now, "params": ()} == {**before, "params": ()}
        assert run.global_step == run.current_epoch == 0


class After(Callback):
    def __init__(self, around):
        self.around = around

    def on_fit_start(self, run, module):
        self.around.check(run, module)


def found_then_trained(plan, mode, place, devices=2, limit=6, **options):
    model = Sized(limit=limit, place=place, **options)
    around, finder = Around(), BatchSizeFinder(mode=mode, init_val=2, steps_per_trial=2, margin=0.0)
    run = trainer(
        LargeScaleStrategy(plan) if plan else "auto",
        devices=devices,
        max_steps=4,
        limit_val_batches=1 if place == "validation" else 0,
        val_check_interval=1,
        callbacks=[around, finder, After(around)],
    )
    run.fit(model)
    return finder.optimal_batch_size, model.batch_size, model.losses, model.sizes[-1]


def plain(batch_size):
    model = Sized(batch_size=batch_size)
    trainer(max_steps=4).fit(model)
    return model.losses


def searches():
    """A choice for every day; all of them are in the slow one."""
    quick = {("ZeRO-3", "power", "backward")}
    for plan in PLANS:
        for mode in ("power", "binsearch"):
            for place in ("forward", "backward"):
                marks = [] if (plan, mode, place) in quick else [pytest.mark.slow]
                yield pytest.param(plan, mode, place, marks=marks)


@pytest.mark.parametrize(("plan", "mode", "place"), list(searches()))
def test_one_rank_out_of_memory_counts_on_all(two, plan, mode, place):
    expected, *_ = found_then_trained(None, mode, place, devices=1, short=0)
    assert expected == {"power": 4, "binsearch": 6}[mode]
    for found, size, losses, used in two.run(found_then_trained, PLANS[plan], mode, place):
        assert found == size == used == expected
        assert losses == pytest.approx(plain(2 * expected), rel=1e-5)


@pytest.mark.slow
def test_out_of_memory_in_validation(two):
    # A plain run would go on with trials of validation alone.
    for found, size, losses, _ in two.run(found_then_trained, PLANS["ZeRO-3"], "power", "validation"):
        assert found == size == 4
        assert losses == pytest.approx(plain(8), rel=1e-5)


class Alike(Sized):
    """Every rank has the same samples, so that the losses of one are those of all."""

    configure_optimizers = Language.configure_optimizers

    def __init__(self):
        super().__init__(batch_size=4, limit=6)

    def loader(self):
        return DataLoader(Tokens(self.samples), batch_size=self.batch_size)

    train_dataloader = loader


def tuned(plan, folder):
    model = Alike()
    run = trainer(LargeScaleStrategy(plan), devices=2, max_steps=4, default_root_dir=folder)
    tuner, before = Tuner(run), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finder = tuner.lr_find(model, num_training=24)
    rate = model.lr
    found = tuner.scale_batch_size(model, steps_per_trial=1)
    state = {
        name: getattr(tensor, "full_tensor", lambda own=tensor: own)() for name, tensor in model.state_dict().items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    run.fit(model)
    return finder.results["loss"], rate, model.lr, found, model.batch_size, model.losses


@pytest.mark.parametrize(
    "plan", [*(pytest.param(plan, marks=pytest.mark.slow) for plan in ("replicate", "ZeRO-2")), "ZeRO-3"]
)
def test_tuner_finds_what_it_finds_in_a_plain_run_and_the_trainer_goes_on(two, plan, tmp_path):
    model = Alike()
    curve = Tuner(trainer(default_root_dir=tmp_path)).lr_find(model, num_training=24).results["loss"]
    expected = Alike()
    expected.lr, expected.batch_size = model.lr, 4
    trainer(max_steps=4).fit(expected)
    for losses, rate, kept, found, size, trained in two.run(tuned, PLANS[plan], tmp_path):
        assert losses == pytest.approx(curve, rel=1e-4)
        assert rate == kept == pytest.approx(model.lr)
        assert found == size == 4
        assert trained == pytest.approx(expected.losses, rel=1e-5)
    assert list(tmp_path.iterdir()) == []


def callback_finds_a_rate(plan, devices):
    model = Alike()
    finder = LearningRateFinder(num_training_steps=24)
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=4, callbacks=[finder])
    run.fit(model)
    return model.lr, run.optimizers[0].param_groups[0]["lr"], model.losses


def test_learning_rate_finder_as_a_callback(two):
    expected = callback_finds_a_rate(None, 1)
    for answer in two.run(callback_finds_a_rate, PLANS["ZeRO-3"], 2):
        assert answer[:2] == pytest.approx(expected[:2])
        assert answer[2] == pytest.approx(expected[2], rel=1e-5)


def evaluated(plan, devices, stage, short):
    model = Sized(limit=6, short=short, samples=32)
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, limit_val_batches=1.0)
    found = Tuner(run).scale_batch_size(model, method=stage, steps_per_trial=2)
    evaluate = getattr(run, stage)
    evaluate(model)
    return found, model.batch_size


@pytest.mark.parametrize(
    ("plan", "stage"),
    [
        ("ZeRO-3", "validate"),
        pytest.param("replicate", "predict", marks=pytest.mark.slow),
        *(pytest.param("replicate", stage, marks=pytest.mark.slow) for stage in ("validate", "test")),
        *(pytest.param("ZeRO-3", stage, marks=pytest.mark.slow) for stage in ("predict", "test")),
    ],
)
def test_evaluation(two, plan, stage):
    expected = evaluated(None, 1, stage, 0)
    assert two.run(evaluated, PLANS[plan], 2, stage, 1) == [expected] * 2


class Count(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(Tokens(self.samples))


class Uneven(Sized):
    """Rank 1 has less data."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def loader(self):
        return DataLoader(self.kind((64, 12)[self.global_rank]), batch_size=self.batch_size)

    train_dataloader = loader


def uneven(kind):
    model = Uneven(kind)
    run = trainer(LargeScaleStrategy(PLANS["ZeRO-3"]), devices=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ranks have .* batches to train on")
        return Tuner(run).scale_batch_size(model, steps_per_trial=4, max_trials=6), model.batch_size


@pytest.mark.parametrize(("kind", "expected"), [(Tokens, 16), (Count, 64)])
@pytest.mark.slow
def test_ranks_with_unequal_data_end_at_the_same_size(two, kind, expected):
    assert two.run(uneven, kind) == [(expected, expected)] * 2


class Wrong(Sized):
    def training_step(self, batch, index):
        if len(batch) > self.limit and self.global_rank == self.short:
            raise ValueError("its own error")
        return super().training_step(batch, index)


def wrong(plan):
    model = Wrong(limit=6, place="nowhere")
    try:
        trainer(LargeScaleStrategy(plan), devices=2, callbacks=[BatchSizeFinder()]).fit(model)
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.slow
def test_another_error_ends_all_ranks():
    with ranks(2) as own:
        assert own.run(wrong, PLANS["ZeRO-3"]) == ["DistError", "ValueError"]


class Large(Sized):
    """A step takes about 28 MiB a sample."""

    def loss(self, batch):
        return super().loss(batch) + self.large(batch)

    def large(self, batch):
        weight = self.head.weight.sum() * 1e-9
        return (torch.ones(len(batch), 2**20) * weight).exp().sin().mean()


def under_a_limit(plan, devices, short):
    model = Large()
    model.losses.append(0.0)
    rank = int(os.environ.get("RANK", 0)) if devices == 2 else 0
    before = resource.getrlimit(resource.RLIMIT_DATA)
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=1)
    run.fit(model)
    if rank == short:
        lines = Path("/proc/self/status").read_text().splitlines()
        used = 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])
        resource.setrlimit(resource.RLIMIT_DATA, (used + 310 * 2**20, before[1]))
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=2)
    try:
        found = Tuner(run).scale_batch_size(model, steps_per_trial=2, max_val=64)
        run.fit(model)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return found, model.batch_size, len(model.losses)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads what Linux says of the process")
@pytest.mark.parametrize("plan", ["replicate", "ZeRO-3"])
def test_memory_that_is_really_short(plan):
    with ranks(1) as alone:
        expected = alone.run(under_a_limit, None, 1, 0)[0]
    assert expected[0] == 8
    with ranks(2) as own:
        assert own.run(under_a_limit, PLANS[plan], 2, 1) == [expected] * 2


def auto(devices):
    model = Sized(limit=6)
    finder = BatchSizeFinder(steps_per_trial=2)
    run = trainer(LargeScaleAutoStrategy(), devices=devices, max_steps=4, callbacks=[finder], enable_model_summary=True)
    run.fit(model)
    return finder.optimal_batch_size, model.losses, len(run.strategy._step_starts)


@pytest.mark.slow
def test_auto_strategy(two):
    for found, losses, timed in two.run(auto, 2):
        assert (found, timed) == (4, 4)
        assert losses == pytest.approx(plain(8), rel=1e-5)


@pytest.mark.slow
def test_ranks_as_forks_tell_the_parent_what_was_found(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    model = Alike()
    run = trainer(LargeScaleStrategy(PLANS["ZeRO-3"], start_method="fork"), devices=2, max_steps=2)
    found = Tuner(run).scale_batch_size(model, steps_per_trial=1, init_val=1)
    assert found == model.batch_size == 4
    rate = Tuner(run).lr_find(model, num_training=14)
    assert rate.suggestion() == model.lr != Alike().lr
    run.fit(model)
    assert not torch.equal(model.head.weight, Alike().head.weight)
