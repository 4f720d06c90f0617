"""Activation checkpointing: keep a block's input, run its forward again in backward.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4; torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_largescale.plan import Plan, PlanError
from lightning_largescale.workload.blocks import find_blocks


def apply_recompute(module: nn.Module, plan: Plan) -> None:
    """Make every repeated block of `module` recompute its activations, as `plan.activation_checkpointing` says.

    Numbers are those of the plain run bit for bit, dropout included. The module is changed in place, its names and
    state_dict keys are not; doing it twice is doing it once, and `remove_recompute` undoes it.

    Raises:
        PlanError: the plan asks for it and `module` has no repeated blocks.
    """
    remove_recompute(module)
    if plan.activation_checkpointing == "none":
        return
    blocks = find_blocks(module)
    if not blocks:
        raise PlanError(
            f"activation_checkpointing={plan.activation_checkpointing!r} needs repeated blocks"
            f" and {type(module).__name__} has none; use 'none'."
        )
    for block in blocks.values():
        # The bound method is replaced, not the module: state_dict keys and isinstance checks stay the user's.
        block.forward = _Recomputed(block.forward, own="forward" in vars(block))


def remove_recompute(module: nn.Module) -> None:
    """Give every block of `module` the forward it had before `apply_recompute`; then it can be copied and pickled."""
    for block in module.modules():
        forward = vars(block).get("forward")
        if isinstance(forward, _Recomputed):
            if forward.own:
                block.forward = forward.original
            else:
                del block.forward


class _Recomputed(partial[Any]):
    """A block's forward under activation checkpointing; `own` says that it replaces one set on the block itself."""

    own: bool
    original: Callable[..., Any]

    def __new__(cls, original: Callable[..., Any], *, own: bool) -> _Recomputed:
        made = super().__new__(cls, checkpoint, original, use_reentrant=False)
        made.own, made.original = own, original
        return made
