"""The auto strategy: it looks, plans, says so, and then trains as the plan says."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from contextlib import redirect_stdout

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from models import VOCAB, Language, trainer
from ranks import quiet

from lightning_largescale import auto
from lightning_largescale.apart import others_threads
from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.callbacks import needs_all_gradients
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.plan import Plan
from lightning_largescale.planner import find_plans
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


def train(strategy, *, devices=1, **options):
    """Losses of a small model, with the trainer."""
    module = Language()
    run = trainer(strategy, devices=devices, **options)
    run.fit(module)
    return module.losses, run


def test_one_process_with_room_is_the_plain_run_bit_for_bit():
    losses, run = train("largescale_auto")
    assert losses == train("auto")[0]
    assert run.strategy.plan == run.strategy.report.best == Plan()
    assert run.strategy.report.candidates[0].status == "chosen"


def test_what_measuring_leaves_behind_is_held_before(monkeypatch):
    left = []
    before = train(LargeScaleAutoStrategy())[1].strategy.report.best_estimate.memory.terms["process before"]
    measure = Hardware.calibrate

    def leave(machine, **options):
        left.append(torch.ones(2**26))
        return measure(machine, **options)

    monkeypatch.setattr(Hardware, "calibrate", leave)
    held = train(LargeScaleAutoStrategy())[1].strategy.report.best_estimate.memory.terms["process before"]
    assert held - before > 0.9 * left[0].nbytes


def test_a_plan_is_written_and_can_be_pinned(tmp_path):
    path = tmp_path / "plan.json"
    losses, run = train(LargeScaleAutoStrategy(plan_out=path))
    assert Plan.load(path) == run.strategy.plan
    pinned, run = train(LargeScaleStrategy(str(path)))
    assert pinned == losses
    assert run.strategy.plan == Plan.load(path)


def auto_on_ranks():
    output = io.StringIO()
    with redirect_stdout(output):
        losses, run = train(LargeScaleAutoStrategy(), devices=2, enable_model_summary=True, max_steps=4)
    return losses, run.strategy.plan, run.strategy.report.to_json(), output.getvalue()


def test_two_processes_agree_and_train_like_one(two):
    (losses, plan, report, shown), (other_losses, other_plan, other_report, other_shown) = two.run(auto_on_ranks)
    assert plan == other_plan
    assert plan.world_size == 2
    assert report == other_report
    assert losses == other_losses == pytest.approx(train("auto", max_steps=4)[0], rel=1e-5)
    assert json.loads(report)["hardware"]["rates"]["all_reduce"]
    assert "peak memory" in shown
    assert "lightning_largescale: peak memory predicted" in shown.splitlines()[-1]
    assert "peak memory" not in other_shown


def too_small_on_ranks():
    module = Language()
    try:
        trainer(LargeScaleAutoStrategy(memory_budget="1MiB"), devices=2).fit(module)
    except PlanError as error:
        return str(error), module.losses
    return None


def test_a_budget_that_nothing_fits_ends_all_ranks_before_a_step(two):
    (message, losses), (other, other_losses) = two.run(too_small_on_ranks)
    assert message == other
    assert losses == other_losses == []
    assert message.startswith("no plan fits 1.00 MiB a rank; the nearest (")
    assert "on device" in message


def test_silent_without_a_model_summary(capsys):
    train("largescale_auto", max_steps=2)
    assert "lightning_largescale" not in capsys.readouterr().out
    train("largescale_auto", max_steps=2, enable_model_summary=True)
    shown = capsys.readouterr().out
    assert "╭─ lightning_largescale" in shown
    assert "lightning_largescale: peak memory predicted" in shown


def test_a_step_that_cannot_be_traced_trains_and_says_so():
    class Branching(Language):
        def training_step(self, batch, index):
            if batch.sum().item() < 0:
                raise ValueError("never")
            return super().training_step(batch, index)

    module = Branching()
    run = trainer("largescale_auto", max_steps=3)
    run.fit(module)
    assert module.losses == train("auto", max_steps=3)[0]
    assert run.strategy.report.workload.approximate


def test_evaluation_alone_then_training():
    module = Language()
    run = trainer("largescale_auto", max_steps=3)
    run.validate(module)
    assert run.strategy.report.workload.stage == "validate"
    run.fit(module)
    assert run.strategy.report.workload.stage == "fit"
    planned = run.strategy.report
    run.test(module)
    assert len(run.predict(module)) == 20
    assert run.strategy.report is planned


def test_the_last_planned_step_is_measured():
    _, run = train("largescale_auto", max_steps=6)
    assert 0 < run.strategy._median_step_seconds() < 60


class Bare(LightningModule):
    def training_step(self, batch, index):
        return batch.float().sum()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(4))

    def configure_optimizers(self):
        return None


class BareEvaluated(Bare):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("sum", loss, on_epoch=True)
        return loss.requires_grad_()

    def validation_step(self, batch, index):
        self.training_step(batch, index)

    def val_dataloader(self):
        return self.train_dataloader()


class Unstepped(Language):
    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None")
def test_a_module_without_parameters_runs_as_lightning_runs_it():
    run = trainer("largescale_auto", max_epochs=1)
    run.validate(BareEvaluated(), verbose=False)
    run.fit(BareEvaluated())
    assert run.callback_metrics["sum"] == pytest.approx(1.5)


def fit_unstepped(devices):
    model = Unstepped()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run = trainer("largescale_auto", devices=devices, max_epochs=1, limit_train_batches=2)
    with pytest.warns(UserWarning, match="this fit will run with no optimizer"):
        run.fit(model)
    return len(model.losses), all(map(torch.equal, before, model.parameters()))


def test_a_module_without_optimizers_runs_as_lightning_runs_it():
    assert fit_unstepped(1) == (2, True)


class Noticing(Language):
    """Code that would notice a step that the run has not asked for."""

    asked, opened, steps = 0, 0, 0

    def train_dataloader(self):
        self.opened += 1
        self.stream = iter(self.loader())
        return self.stream

    def training_step(self, batch, index):
        self.steps += 1
        torch.manual_seed(7)
        return super().training_step(batch, index)

    def configure_optimizers(self):
        self.asked += 1
        return super().configure_optimizers()


def notice(devices):
    model = Noticing()
    trainer("largescale_auto", devices=devices, max_steps=3).fit(model)
    return model.steps, model.opened, model.asked, len(list(model.stream)) in (16, 17), model.losses


def test_planning_leaves_no_trace(two):
    plain = notice(1)
    assert plain[:4] == (3, 1, 1, True)
    for found in two.run(notice, 2):
        assert found[:4] == (3, 1, 1, True)
        assert found[4] == pytest.approx(plain[4], rel=1e-5)


class Crashing(Language):
    def training_step(self, batch, index):
        if batch.__class__ is not torch.Tensor:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().training_step(batch, index)


def test_a_trace_that_crashes_is_an_estimate():
    # Or it would crash these tests.
    assert others_threads() == []
    model = Crashing()
    run = trainer("largescale_auto", max_steps=3)
    run.fit(model)
    assert len(model.losses) == 3
    assert "could not be traced apart (was killed by signal 11" in run.strategy.report.workload.approximate[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": "much"}, "memory_budget='much' is no size"),
        ({"allow": ("fp4",)}, r"allow=\('fp4',\) is not accepted"),
        ({"allow": "bf16-mixed"}, "allow='bf16-mixed' is not accepted; give a tuple"),
        ({"start_method": "magic"}, "start_method='magic'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(PlanError, match=message):
        LargeScaleAutoStrategy(**options)


def test_a_refused_run_is_refused_again_and_leaves_nothing_behind():
    module = Language()
    run = trainer(LargeScaleAutoStrategy(memory_budget="1MiB"))
    for _ in range(2):
        with pytest.raises(PlanError, match="no plan fits"):
            run.fit(module)
    assert module.losses == []


def sharded_then_auto():
    module = Language()
    trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=2).fit(module)
    run = trainer(LargeScaleAutoStrategy(), devices=2)
    run.validate(module)
    return run.strategy.plan


def test_a_module_that_another_strategy_sharded_keeps_its_plan(two):
    assert two.run(sharded_then_auto) == [Plan(dp_shard=2)] * 2


def test_words_of_others_are_shown_as_they_are(capsys):
    parent = os.getpid()

    class Odd(Language):
        def training_step(self, batch, index):
            if batch.sum().item() < 0:
                raise ValueError("never")
            return super().training_step(batch, index)

        def train_dataloader(self):
            if os.getpid() != parent:
                raise FileNotFoundError("[/data/x.bin] [bold]")
            return self.loader()

    trainer("largescale_auto", max_steps=2, enable_model_summary=True).fit(Odd())
    assert "[/data/x.bin]" in capsys.readouterr().out


def test_what_is_not_allowed_is_priced_for_the_advice():
    run = trainer("largescale_auto", max_steps=1)
    run.fit(Language())
    report = run.strategy.report
    assert report.best.precision == "32-true"
    statuses = {row.status for row in report.candidates if row.plan.precision == "bf16-mixed"}
    assert statuses in ({"not allowed"}, {"not possible"})


class Watched(Callback):
    """Whether the heap is watched while a step runs."""

    def on_train_batch_end(self, *args):
        self.found = any("heap watch" in thread.name for thread in threading.enumerate())


def watched(strategy, devices):
    callback = Watched()
    run = trainer(strategy, devices=devices, max_steps=1, callbacks=[callback])
    run.fit(Language())
    assert not any("heap watch" in thread.name for thread in threading.enumerate())
    return run.strategy.plan, callback.found


def test_a_heap_is_watched_under_plans_that_recompute_and_where_a_plain_run_was_predicted(two):
    assert watched("largescale_auto", 1) == (Plan(), True)
    assert two.run(watched, "largescale_auto", 2) == [(Plan(dp_replicate=2), False)] * 2
    full = Plan(activation_checkpointing="full")
    assert watched(LargeScaleStrategy(full), 1) == (full, True)
    assert watched(LargeScaleStrategy(Plan()), 1) == (Plan(), False)


def test_a_clock_that_a_test_has_replaced_is_not_asked(monkeypatch):
    asked = []
    trainer("largescale_auto", max_steps=2).fit(Language())
    monkeypatch.setattr(time, "perf_counter", lambda: asked.append(1) or 0.0)
    trainer("largescale_auto", max_steps=2).fit(Language())
    ours, asked[:] = len(asked), []
    trainer(max_steps=2).fit(Language())
    assert ours == len(asked)


class Clips(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer): ...


class Steps(Language):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


class ByHand(Language):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options", "may"),
    [
        (Language, {}, True),
        (Language, {"gradient_clip_val": 1.0}, False),
        (Language, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, True),
        (Language, {"gradient_clip_val": 0.0}, True),
        (Language, {"callbacks": [Clips()]}, False),
        (Language, {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 4})]}, False),
        (Steps, {}, False),
        (ByHand, {}, False),
    ],
)
def test_gradients_are_released_only_where_nothing_looks_at_all_of_them(module, options, may):
    assert (needs_all_gradients(trainer("auto", **options), module()) is None) == may


class Later(Language):
    def configure_model(self):
        self.bias = torch.nn.Parameter(torch.zeros(VOCAB))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.bias.sum()


def told(module):
    """What rank 0 tells the planner."""
    options = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "find_plans", lambda *args, **given: options.append(given) or find_plans(*args, **given))
        trainer(LargeScaleAutoStrategy(), devices=2, max_steps=1).fit(module())
    return options


@pytest.mark.parametrize(("module", "built"), [(Language, True), (Later, False)])
def test_the_planner_is_told_what_may_be_done_and_whether_the_model_is_there(two, module, built):
    (options,), others = two.run(told, module)
    assert others == []
    assert options["may_release"] is True
    assert options["built"] is built
