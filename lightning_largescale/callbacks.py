"""Checks of Lightning's callbacks against a plan: which cannot work on shards, and which keep copies of the module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelPruning, ModelSummary
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.copies import find_copies
from lightning_largescale.plan import Plan

# Hooks of modules and of callbacks that may read the gradients of a step, or change how they are used.
_SEE_GRADIENTS = ("configure_gradient_clipping", "optimizer_step", "on_before_optimizer_step", "on_after_backward")


def callbacks_of(trainer: Trainer) -> Sequence[Callback]:
    """Return the callbacks of `trainer`, including those that the module configures."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight
    return callbacks


def copies_of(module: nn.Module, callbacks: Sequence[Callback]) -> Iterator[nn.Module]:
    """Yield the copies that `callbacks` hold of `module`: full copies, and layers that pruning goes back to."""
    yield from find_copies(callbacks, module)
    for callback in callbacks:
        if isinstance(callback, ModelPruning):
            yield from compat.pruning_originals(callback)


def shows_summary(trainer: Trainer) -> bool:
    """Return whether the user wants a summary: not with `enable_model_summary=False` or `barebones`."""
    return any(isinstance(callback, ModelSummary) for callback in callbacks_of(trainer))


def needs_all_gradients(trainer: Trainer, module: LightningModule) -> str | None:
    """Return the setting or hook that needs all gradients of a step at once, or accumulates them; None if none does."""
    if not module.automatic_optimization:
        return "automatic_optimization=False"
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
        return "gradient_clip_val, which clips by norm,"
    if trainer.accumulate_grad_batches > 1:
        return f"accumulate_grad_batches={trainer.accumulate_grad_batches}"
    for owner in (module, *callbacks_of(trainer)):
        if isinstance(owner, GradientAccumulationScheduler):
            return type(owner).__name__
        for hook in _SEE_GRADIENTS:
            if (isinstance(owner, LightningModule) or hasattr(Callback, hook)) and is_overridden(hook, owner):
                return f"{type(owner).__name__}.{hook}"
    return None


def check_callbacks(callbacks: Sequence[Callback], plan: Plan) -> None:
    """Refuse callbacks that cannot work under `plan`.

    Raises:
        PlanError: a callback replaces parameters, and the plan shards them.
    """
    divides = plan.gathers or (plan.world_size > 1 and plan.row_sharded_embeddings)
    for callback in callbacks:
        if isinstance(callback, ModelPruning) and divides:
            raise PlanError(
                f"{type(callback).__name__} replaces parameters by masked ones and the plan ({plan.describe()}) divides"
                " them among ranks; replicate with dp_replicate, or prune after training."
            )
