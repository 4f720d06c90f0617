"""LargeScalePrecision: the Lightning Precision plugin that a Plan implies."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import Optimizer
from typing_extensions import override

from lightning_largescale.parallel.clip import clip_gradients_by_norm, clip_gradients_by_value
from lightning_largescale.plan import Plan, PlanError

# Lightning's plugins that a plan's precision stands for. Another one, or a subclass, does something of its own.
_ACCEPTED = {Precision: "32-true", MixedPrecision: "bf16-mixed"}


class LargeScalePrecision(Precision):
    """The arithmetic of a plan, and clipping of gradients that are spread over ranks.

    Args:
        precision: "32-true", or "bf16-mixed": matrix products in bfloat16 under `torch.autocast`, weights in float32.
        device_type: "cpu" or "cuda".

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1; Kalamkar et al. 2019, "A Study of
        BFLOAT16 for Deep Learning Training" (no loss scaling).
    """

    def __init__(self, precision: str, device_type: str) -> None:
        self.precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed" if precision == "bf16-mixed" else "32-true"
        self._device_type = device_type

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Autocast to bfloat16 where the plan is mixed."""
        if self.precision == "32-true":
            yield
            return
        # Without the cache, as Lightning's plugin: it would keep casts of parameters that sharding frees.
        with torch.autocast(self._device_type, dtype=torch.bfloat16, cache_enabled=False):
            yield

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip by the norm of the gradients on all ranks together."""
        clip_gradients_by_norm(self.main_params(optimizer), float(clip_val))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip every element of the gradients."""
        clip_gradients_by_value(self.main_params(optimizer), float(clip_val))


def asked_precision(plugin: Precision) -> str | None:
    """The precision that the user gave the Trainer; None for its default, which cannot be told from none.

    Raises:
        PlanError: `plugin` is one that no plan stands for.
    """
    if isinstance(plugin, LargeScalePrecision):
        return plugin.precision
    precision = str(plugin.precision)
    if _ACCEPTED.get(type(plugin)) != precision:
        raise PlanError(
            f"the Trainer's precision plugin is {type(plugin).__name__} ({precision!r}) and a plan trains in '32-true'"
            " or 'bf16-mixed'; give one of these as Trainer(precision=...), and no plugin."
        )
    return None if precision == Plan().precision else precision


def check_precision(asked: str | None, plan: Plan) -> None:
    """Refuse a plan whose precision is not the one that the user gave the Trainer.

    Raises:
        PlanError: they differ.
    """
    if asked is not None and asked != plan.precision:
        raise PlanError(
            f"Trainer(precision={asked!r}) contradicts the plan's precision={plan.precision!r};"
            " give both the same, or the plan's alone."
        )
