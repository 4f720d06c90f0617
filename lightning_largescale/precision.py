"""Lightning's precision plugin for a plan: the user's, if there is one."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DeepSpeedPrecision,
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
    XLAPrecision,
)
from torch import nn

from lightning_largescale.arithmetic import CAST_TYPE, lightning_plugin
from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE

# Lightning's plugins that only apply their precision.
_STANDARD = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
# Lightning's plugins that replace layers, or belong to other strategies.
_REFUSED = (BitsandbytesPrecision, DeepSpeedPrecision, FSDPPrecision, TransformerEnginePrecision, XLAPrecision)


def asked_precision(plugin: Precision) -> str | None:
    """Return the precision that the user gave the Trainer; None for the Trainer's default.

    The default given explicitly cannot be distinguished from none.

    Raises:
        PlanError: no plan has the precision of `plugin`.
    """
    precision = str(plugin.precision)
    if isinstance(plugin, _REFUSED) or precision not in MATMUL_TYPE:
        raise PlanError(
            f"the Trainer's precision plugin is {type(plugin).__name__} ({precision!r}), and a plan trains in"
            f" {', '.join(map(repr, MATMUL_TYPE))}; give one of these as Trainer(precision=...), or a plugin of your"
            " own whose precision is one of them."
        )
    return None if type(plugin) is Precision else precision


def check_precision(asked: str | None, plan: Plan) -> None:
    """Check that the precision of `plan` is the one that the user gave the Trainer.

    Raises:
        PlanError: they differ.
    """
    if asked is not None and asked != plan.precision:
        raise PlanError(
            f"Trainer(precision={asked!r}) contradicts the plan's precision={plan.precision!r};"
            " give both the same, or the plan's alone."
        )


def plugin_for(plan: Plan, given: Precision, device_type: str) -> Precision:
    """Return the precision plugin of a plan: the Trainer's, unless that is the default.

    Args:
        plan: The plan.
        given: The Trainer's plugin.
        device_type: The type of the device, "cpu" or "cuda".

    Raises:
        PlanError: the Trainer's plugin contradicts the plan, or is one that no plan supports.
    """
    asked = asked_precision(given)
    check_precision(asked, plan)
    if asked is not None or plan.precision == str(given.precision):
        return given
    return lightning_plugin(plan.precision, device_type)


def is_own(plugin: Precision) -> bool:
    """Return whether `plugin` is of a user's class, which may do more than apply its precision."""
    return type(plugin) not in _STANDARD


def cast_type(plugin: Precision) -> torch.dtype | None:
    """Return the type that `plugin` casts every matrix to; None if it casts none, or the type is not known."""
    return None if is_own(plugin) else CAST_TYPE.get(str(plugin.precision))


def convert_module(plugin: Precision, module: nn.Module) -> None:
    """Convert the parameters of `module` with `plugin`, in place.

    Raises:
        PlanError: the plugin returns another module.
    """
    if plugin.convert_module(module) is not module:
        raise PlanError(
            f"{type(plugin).__name__}.convert_module returned another module than it was given;"
            " change that one in place and return it."
        )
