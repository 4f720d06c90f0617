"""What Lightning lets a user do around an optimizer's step: under every plan as on one process."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from models import GLOBAL_BATCH, Language, Lion, SaveLast, ScheduleFree, trainer
from ranks import quiet
from torch import nn
from torch.optim import lr_scheduler

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet

PLANS = {
    "ZeRO-3": Plan(dp_shard=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "replicate": Plan(dp_replicate=2),
}
# Steps of an epoch.
STEPS = 3


class Fused(Language):
    """Trains by an optimizer that steps in parts where the module is divided."""

    def __init__(self, **options):
        super().__init__(layers=2, samples=STEPS * GLOBAL_BATCH, **options)
        self.rates: list[float] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, fused=True)

    def on_train_batch_end(self, outputs, batch, index):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


class Edited(Fused):
    """Changes gradients in place before the step, and reads the state between steps."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class Stepping(Fused):
    """Runs the step itself: every other one leaves its gradients, and the closure runs first."""

    def optimizer_step(self, epoch, index, optimizer, optimizer_closure=None):
        if index % 2:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, index, optimizer, optimizer_closure)


class ByItself(Fused):
    """Steps the optimizer without Lightning's wrapper."""

    def optimizer_step(self, epoch, index, optimizer, optimizer_closure=None):
        self.trainer.optimizers[0].step(closure=optimizer_closure)
        self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_completed()


class Cleared(Fused):
    """Clears gradients in its own way."""

    def optimizer_zero_grad(self, epoch, index, optimizer):
        optimizer.zero_grad(set_to_none=False)


class Manual(Fused):
    """Steps with a closure given by hand, and a scheduler by hand."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = None

        def closure():
            nonlocal loss
            loss = super(Manual, self).training_step(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        assert optimizer.step(closure=closure) is loss
        scheduler.step()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.7)]


class Toggled(Manual):
    """Two optimizers in turns, gradients of the first gathered over two batches."""

    def training_step(self, batch, index):
        first, second = self.optimizers()
        with first.toggle_model(sync_grad=index % 2 == 1):
            self.manual_backward(Language.training_step(self, batch, index))
            if index % 2 == 1:
                first.step()
                first.zero_grad()
        with second.toggle_model():
            self.manual_backward(Language.training_step(self, batch, index))
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        blocks = torch.optim.SGD(self.blocks.parameters(), lr=0.2, fused=True)
        return blocks, torch.optim.AdamW([*self.head.parameters(), *self.embedding.parameters()], lr=1e-2)


class Scheduled(Fused):
    """Args: `kind`: of scheduler, by name."""

    def __init__(self, kind, **options):
        super().__init__(**options)
        self.kind = kind

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        # A metric for the plateau, equal on all ranks and rising.
        self.log("rising", float(self.global_step), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        kinds = {
            "epoch": lambda: lr_scheduler.StepLR(optimizer, 1, 0.5),
            "step": lambda: {"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"},
            "frequency": lambda: {
                "scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5),
                "interval": "step",
                "frequency": 2,
            },
            "plateau": lambda: {
                "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
                "monitor": "rising",
            },
            "one cycle": lambda: {
                "scheduler": lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20),
                "interval": "step",
            },
            # Nothing at first, as warm-up does.
            "lambda": lambda: {
                "scheduler": lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1)),
                "interval": "step",
            },
            "restarts": lambda: {
                "scheduler": lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
                "interval": "step",
            },
            "own step": lambda: lr_scheduler.StepLR(optimizer, 1, 0.9),
        }
        return {"optimizer": optimizer, "lr_scheduler": kinds[self.kind]()}

    def lr_scheduler_step(self, scheduler, metric):
        super().lr_scheduler_step(scheduler, metric)
        if self.kind == "own step":
            scheduler.step()


class Unfreeze(BaseFinetuning):
    """The head alone at first, then a block in each epoch, the last with another rate."""

    def freeze_before_training(self, module):
        self.freeze([module.embedding, module.blocks, module.norm])

    def finetune_function(self, module, epoch, optimizer):
        if epoch:
            self.unfreeze_and_add_param_group(module.blocks[epoch - 1], optimizer, lr=0.1 / epoch)


class Backbone(Fused):
    """With a part that is called its backbone."""

    def __init__(self, **options):
        super().__init__(**options)
        self.backbone = self.blocks
        del self.blocks

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.backbone:
            x = block(x)
        return self.norm(x)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.2, fused=True)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Head(Fused):
    """Trains what is trainable at the start; what comes later is added."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, tokens):
        return super().forward(tokens) * self.scale

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2, momentum=0.9)


def fit(module, plan, devices, arguments=(), callbacks=(), **options):
    """Losses, learning rates and the weights after the run."""
    model = module(*arguments, seed=int(os.environ.get("RANK", 0)))
    strategy = LargeScaleStrategy(plan) if plan else "auto"
    given = {"max_steps": -1, "max_epochs": 3, "callbacks": [callback(*rest) for callback, *rest in callbacks]}
    run = trainer(strategy, devices=devices, **{**given, **options})
    run.fit(model)
    return model.losses + model.rates


def assert_parity(ranks, plan, module, **options):
    expected = fit(module, None, 1, **options)
    assert len(expected) >= 9
    for found in ranks.run(fit, module, PLANS[plan], 2, **options):
        assert found == pytest.approx(expected, rel=1e-5)


def cases(names, quick):
    """Every name under every plan; those in `quick`, by name and plan, every day."""
    titles = {name if isinstance(name, str) else name.__name__: name for name in names}
    return [
        pytest.param(name, plan, marks=[] if (title, plan) in quick else pytest.mark.slow, id=f"{title}-{plan}")
        for title, name in titles.items()
        for plan in PLANS
    ]


HOOKS = [Edited, Stepping, ByItself, Cleared, Manual, Toggled]


@pytest.mark.parametrize(
    ("module", "plan"),
    cases(HOOKS, {("Edited", "ZeRO-3"), ("ByItself", "ZeRO-2"), ("Manual", "ZeRO-3"), ("Toggled", "replicate")}),
)
def test_hooks_around_the_step(two, module, plan):
    assert_parity(two, plan, module)


KINDS = ["epoch", "step", "frequency", "plateau", "one cycle", "lambda", "restarts", "own step"]


@pytest.mark.parametrize(("kind", "plan"), cases(KINDS, {("lambda", "ZeRO-3"), ("plateau", "ZeRO-2")}))
def test_schedulers(two, kind, plan):
    assert_parity(two, plan, Scheduled, arguments=[kind])


@pytest.mark.parametrize("plan", PLANS)
def test_parts_unfrozen_epoch_by_epoch(two, plan):
    assert_parity(two, plan, Head, callbacks=[[Unfreeze]])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_backbone_finetuning(two, plan):
    assert_parity(two, plan, Backbone, callbacks=[[BackboneFinetuning, 1]])


class Quasi(Fused):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)


def test_an_optimizer_that_evaluates_again_on_one_process():
    assert fit(Quasi, Plan(), 1) == fit(Quasi, None, 1)


class Moded(Language):
    """Trains by an optimizer that hooks have to make ready for its steps."""

    def __init__(self, kind, **options):
        super().__init__(layers=2, samples=STEPS * GLOBAL_BATCH, **options)
        self.kind = kind

    @property
    def optimizer(self):
        return self.trainer.optimizers[0]

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=1e-2)


class Switched(Moded):
    """Trains and evaluates at different weights."""

    def __init__(self, **options):
        super().__init__(ScheduleFree, **options)

    def on_train_epoch_start(self):
        self.optimizer.train()

    def on_validation_start(self):
        self.optimizer.eval()

    def on_validation_end(self):
        self.optimizer.train()

    def on_save_checkpoint(self, checkpoint):
        # As its state says.
        assert self.optimizer.param_groups[0]["training"]


class Momentum(Lion):
    """With a momentum; what it needs for a step is given by the run."""

    def update(self, parameter, state, group):
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        parameter.sub_(mean.mul_(0.9).add_(parameter.grad), alpha=group["lr"] * self.total_steps / 10)


class FromCallback(Moded):
    """Its callback tells the optimizer how long the run is."""

    def __init__(self, **options):
        super().__init__(Momentum, **options)

    def configure_callbacks(self):
        return [Telling()]


class Telling(Callback):
    def on_fit_start(self, trainer, module):
        trainer.optimizers[0].total_steps = trainer.max_epochs * STEPS


class InStep(Moded):
    """The same, between backward and the step."""

    def __init__(self, **options):
        super().__init__(Momentum, **options)

    def on_before_optimizer_step(self, optimizer):
        optimizer.total_steps = 6


class Armed(Momentum):
    """Does nothing, and keeps nothing, until it may."""

    armed, total_steps = False, 6

    def update(self, parameter, state, group):
        if self.armed:
            super().update(parameter, state, group)


class Waiting(Moded):
    def __init__(self, **options):
        super().__init__(Armed, **options)

    def on_train_start(self):
        self.optimizer.armed = True


class Joint(Momentum):
    """Treats each element by itself until it is to take the norm of all gradients."""

    joint, total_steps = False, 6

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self.joint:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([float(gradient.norm()) * torch.ones(()) for gradient in gradients]).norm()
            for gradient in gradients:
                gradient.div_(norm)
        super().step()
        return loss


class Normed(Moded):
    def __init__(self, **options):
        super().__init__(Joint, **options)

    def on_train_start(self):
        self.optimizer.joint = True


MODED = {"train()": Switched, "callback": FromCallback, "in the step": InStep, "silent": Waiting, "joint": Normed}
ALONE = {
    "state on disk": {"offload_optimizer": "nvme"},
    "state in DRAM": {"offload_optimizer": "cpu"},
    "released": {"release_gradients": True, "offload_optimizer": "nvme"},
    "parameters": {"offload_parameters": "nvme", "offload_optimizer": "nvme"},
}


def moded(name, plan, devices, resume=None, **options):
    """Losses of training and of evaluation; the error where it is refused."""
    module = MODED[name]()
    given = {"max_steps": -1, "max_epochs": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options}
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, **given)
    try:
        run.fit(module, ckpt_path=resume, weights_only=False)
    except PlanError as error:
        return str(error), module.losses
    return module.losses, module.evaluated


@pytest.mark.parametrize("name", [one for one in MODED if one != "joint"])
def test_an_optimizer_that_hooks_make_ready(two, tmp_path, name):
    expected = moded(name, None, 1)
    for fields in ALONE.values() if name == "train()" else [ALONE["state on disk"]]:
        assert moded(name, Plan(nvme_path=str(tmp_path), **fields), 1) == expected
    for losses, evaluated in two.run(moded, name, PLANS["ZeRO-3"], 2):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert evaluated == pytest.approx(expected[1], rel=1e-5)


def test_an_optimizer_that_hooks_let_take_all_gradients_at_once(two, tmp_path):
    # Asked at setup, it steps on some parameters after the others.
    for fields in ({"offload_optimizer": "nvme"}, {"release_gradients": True}):
        told, losses = moded("joint", Plan(nvme_path=str(tmp_path), **fields), 1)
        assert told.startswith("Joint cannot be paged: its step on one parameter after the other is not that on all")
        assert len(losses) == 1
    expected = moded("joint", None, 1)
    for losses, evaluated in two.run(moded, "joint", PLANS["ZeRO-3"], 2):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert evaluated == pytest.approx(expected[1], rel=1e-5)


def test_an_optimizer_with_modes_goes_on_from_a_checkpoint(two, tmp_path):
    path = tmp_path / "a.ckpt"
    moded("train()", None, 1, max_epochs=1, limit_val_batches=0, callbacks=[SaveLast(path)])
    expected = moded("train()", None, 1, resume=path)
    assert len(expected[0]) == STEPS
    for fields in (ALONE["state on disk"], ALONE["released"]):
        assert moded("train()", Plan(nvme_path=str(tmp_path), **fields), 1, resume=path) == expected
    for losses, evaluated in two.run(moded, "train()", PLANS["ZeRO-3"], 2, resume=path):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert evaluated == pytest.approx(expected[1], rel=1e-5)
