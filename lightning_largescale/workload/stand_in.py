"""Stand-ins without side effects for what a LightningModule's step uses: trainer, optimizers, logging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_largescale import compat

# The run's length for schedulers that need it, if there is no trainer to ask, or asking would load the data.
_STEPS_ASSUMED = 1000


class TrainerStandIn:
    """Has the trainer's attributes, keeps attributes set on it to itself, and ignores calls of the trainer's methods.

    Args:
        module: the module whose `configure_optimizers` is called when its optimizers are first read.
        real: the trainer whose settings are read; None if the module has none.
    """

    def __init__(self, module: Any = None, real: Any = None) -> None:
        self._module = module
        self._real = real
        self.logger = DummyLogger()
        self.loggers = [self.logger]
        self.callback_metrics: dict[str, Any] = {}
        self.logged_metrics: dict[str, Any] = {}
        self.progress_bar_metrics: dict[str, Any] = {}
        limit = getattr(real, "max_steps", -1)
        self.estimated_stepping_batches = limit if limit and limit > 0 else _STEPS_ASSUMED
        self.num_training_batches = self.estimated_stepping_batches
        self.should_stop = False
        self.strategy = _StrategyStandIn()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("optimizers", "lr_scheduler_configs"):
            self._configure()
            return vars(self)[name]
        if self._real is None:
            if name not in _DEFAULTS:
                raise AttributeError(f"{name} is not known without a Trainer")
            return _DEFAULTS[name]
        value = getattr(self._real, name)
        return _nothing if callable(value) and getattr(value, "__self__", None) is self._real else value

    def _configure(self) -> None:
        # Outside the modes: what optimizers allocate at construction is not part of the step.
        with compat.without_dispatch_modes(), torch.no_grad():
            configured = self._module.configure_optimizers()
        self.optimizers = [OptimizerStandIn(optimizer) for optimizer in optimizers_of(configured)]
        self.lr_scheduler_configs = [
            LRSchedulerConfig(cast(Any, SchedulerStandIn(scheduler))) for scheduler in schedulers_of(configured)
        ]


_DEFAULTS: dict[str, Any] = {
    "accumulate_grad_batches": 1,
    "callbacks": [],
    "check_val_every_n_epoch": 1,
    "checkpoint_callback": None,
    "checkpoint_callbacks": [],
    "current_epoch": 0,
    "datamodule": None,
    "default_root_dir": ".",
    "device_ids": [0],
    "early_stopping_callback": None,
    "early_stopping_callbacks": [],
    "evaluating": False,
    "fast_dev_run": False,
    "global_rank": 0,
    "global_step": 0,
    "gradient_clip_algorithm": None,
    "gradient_clip_val": None,
    "is_global_zero": True,
    "is_last_batch": False,
    "local_rank": 0,
    "log_every_n_steps": 50,
    "log_dir": None,
    "max_epochs": 1,
    "max_steps": -1,
    "max_time": None,
    "min_epochs": None,
    "min_steps": None,
    "num_devices": 1,
    "num_nodes": 1,
    "num_sanity_val_batches": [0],
    "num_test_batches": [0],
    "num_val_batches": [0],
    "precision": "32-true",
    "predicting": False,
    "progress_bar_callback": None,
    "sanity_checking": False,
    "testing": False,
    "train_dataloader": None,
    "training": True,
    "test_dataloaders": None,
    "val_check_interval": 1.0,
    "val_dataloaders": None,
    "validating": False,
    "world_size": 1,
}


class _StrategyStandIn:
    """The strategy of one process on the CPU."""

    root_device = torch.device("cpu")
    world_size = 1
    global_rank = local_rank = 0
    is_global_zero = True

    def backward(self, loss: torch.Tensor, _: Any = None, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def all_gather(self, data: Any, *_: Any, **__: Any) -> Any:
        return data

    reduce = broadcast = all_gather

    def barrier(self, *_: Any, **__: Any) -> None:
        return None

    def reduce_boolean_decision(self, decision: bool, *_: Any, **__: Any) -> bool:
        return decision

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        yield

    full_parameters = block_backward_sync


class OptimizerStandIn:
    """An optimizer of the module as `self.optimizers()` returns it: its settings are real, its step changes nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        """Run the closure, if any, and leave the parameters as they are."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Do nothing; there is nothing to synchronize."""
        yield


class SchedulerStandIn:
    """A learning-rate scheduler as `self.lr_schedulers()` returns it; its steps do nothing."""

    def __init__(self, scheduler: Any = None) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


def attach(module: nn.Module) -> None:
    """Give every LightningModule in `module` a stand-in trainer, optimizers and schedulers, and silence what it logs.

    Call within `Snapshot.untouched`.
    """
    modules = [child for child in module.modules() if isinstance(child, LightningModule)]
    trainer = TrainerStandIn(module, next((t for t in map(compat.attached_trainer, modules) if t is not None), None))
    for child in modules:
        compat.attach_trainer(child, trainer)
        child.__dict__.update(
            dict.fromkeys(("log", "log_dict", "print", "clip_gradients"), _nothing),
            all_gather=trainer.strategy.all_gather,
            manual_backward=lambda loss, *args, **kwargs: loss.backward(*args, **kwargs),
            optimizers=lambda *_, **__: _one_or_all(trainer.optimizers),
            lr_schedulers=lambda: _one_or_all([one.scheduler for one in trainer.lr_scheduler_configs]) or None,
        )


def optimizers_of(configured: Any) -> list[Optimizer]:
    """Return the optimizers in the result of `configure_optimizers`, in its order."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return optimizers_of(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [found for item in configured for found in optimizers_of(item)]
    return []


def schedulers_of(configured: Any) -> list[Any]:
    """Return the schedulers in the result of `configure_optimizers`, in its order."""
    if isinstance(configured, dict):
        return schedulers_of(configured.get("lr_scheduler", configured.get("scheduler")))
    if isinstance(configured, (list, tuple)):
        return [found for item in configured for found in schedulers_of(item)]
    return [] if configured is None or isinstance(configured, (Optimizer, int, str)) else [configured]


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def _nothing(*_: Any, **__: Any) -> None:
    return None
