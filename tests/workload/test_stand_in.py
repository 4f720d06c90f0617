import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from workload import families
from workload.check import assert_same, state_of
from workload.families import Metered, two_tensors

from lightning_largescale.workload import Workload
from lightning_largescale.workload.stand_in import TrainerStandIn, optimizers_of, schedulers_of


def test_manual_optimisation_needs_of_each_optimizer():
    work = Workload.trace(families.GAN(), torch.randn(4, 16), precisions=("32-true",))
    assert [needs.class_name for needs in work.optimizers] == ["Adam", "Adam"]
    assert all(name.startswith("generator.") for name in work.optimizers[0].state_bytes)
    assert all(p.used for p in work.parameters)


def test_nothing_of_a_real_trainer_changes(tmp_path):
    module = Metered()
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer = trainer
    batch, before = two_tensors(), state_of(module)
    work = Workload.trace(module, batch, precisions=("32-true",))
    assert_same(before, state_of(module))
    assert module.trainer is trainer
    assert not trainer.should_stop
    assert trainer.callback_metrics == {}
    assert [needs.class_name for needs in work.optimizers] == ["SGD"]


def test_without_a_trainer_settings_have_defaults():
    trainer = TrainerStandIn()
    assert trainer.is_global_zero
    assert trainer.estimated_stepping_batches == 1000
    trainer.should_stop = True
    with pytest.raises(AttributeError, match="fit is not known without a Trainer"):
        trainer.fit  # noqa: B018


def test_with_a_trainer_settings_are_its_own_and_actions_do_nothing(tmp_path):
    real = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=7)
    trainer = TrainerStandIn(real=real)
    assert trainer.estimated_stepping_batches == 7
    assert trainer.max_epochs == real.max_epochs
    trainer.save_checkpoint("nowhere")
    trainer.logger.log_metrics({"a": 1})
    assert list(tmp_path.iterdir()) == []


class Asking(LightningModule):
    """Asks the strategy in its step, as accumulation by hand does."""

    def __init__(self, ask):
        super().__init__()
        self.net, self.ask = nn.Linear(4, 4), ask

    def training_step(self, batch, index):
        return ASKED[self.ask](self.trainer.strategy, lambda: self.net(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def within(context, step):
    with context:
        return step()


ASKED = {
    "block_backward_sync": lambda strategy, step: within(strategy.block_backward_sync(), step),
    "full_parameters": lambda strategy, step: within(strategy.full_parameters(), step),
    "reduce_boolean_decision": lambda strategy, step: step() if strategy.reduce_boolean_decision(True) else None,
}


@pytest.mark.parametrize("ask", ASKED)
def test_a_step_that_asks_the_strategy_is_traced(ask):
    assert Workload.trace(Asking(ask), torch.randn(2, 4), precisions=("32-true",)).approximate == ()


def test_what_configure_optimizers_may_return():
    first, second = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0) for _ in range(2))
    decay = torch.optim.lr_scheduler.StepLR(first, 1)
    for returned, optimizers, schedulers in [
        (None, [], []),
        (first, [first], []),
        ([first, second], [first, second], []),
        (([first, second], [decay]), [first, second], [decay]),
        (([first], [{"scheduler": decay, "interval": "step"}]), [first], [decay]),
        ({"optimizer": first, "lr_scheduler": decay}, [first], [decay]),
        ({"optimizer": first, "lr_scheduler": {"scheduler": decay, "monitor": "x"}}, [first], [decay]),
        (({"optimizer": first}, {"optimizer": second, "lr_scheduler": decay}), [first, second], [decay]),
    ]:
        assert optimizers_of(returned) == optimizers
        assert schedulers_of(returned) == schedulers


class Reporting(families.Wrapped):
    """Asks for optimizers and schedulers although it steps none."""

    asked = 0

    def training_step(self, batch, batch_idx):
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        self.log("next", self.lr_schedulers().get_last_lr()[0])
        self.log("first", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("all", [one.scheduler.get_last_lr() for one in self.trainer.lr_scheduler_configs])
        assert self.trainer.checkpoint_callback is None
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        type(self).asked += 1
        optimizer = torch.optim.Adagrad(self.parameters(), lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_automatic_optimisation_may_ask_for_its_optimizers():
    batch = torch.randn(4, 8)
    work = Workload.trace(Reporting(nn.Linear(8, 8)), batch, precisions=("32-true",))
    assert work.approximate == ()
    plain = Workload.trace(families.Wrapped(nn.Linear(8, 8)), batch, precisions=("32-true",))
    # What the optimizer keeps is no part of the step.
    assert work.steps == plain.steps
    # Once in the step, and once for what it needs.
    assert Reporting.asked == 2
