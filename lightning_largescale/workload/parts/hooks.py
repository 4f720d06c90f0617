"""Rules of hooks on shards: code that asks for the gradient of a tensor receives the unsharded gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_largescale import compat
from lightning_largescale.workload.parts.engine import OnParts, Rule
from lightning_largescale.workload.parts.part import cut, part_of


def rules() -> dict[Callable[..., Any], Rule]:
    """Return the rules by function."""
    return {torch.Tensor.register_hook: _register_hook, compat.view_base_getter(): _view_base}


def _register_hook(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensor, hook = args
    part = part_of(tensor)
    if part is None or compat.is_of_sharding(hook):
        # FSDP2's hook, which unshards parameters for backward, returns the gradient unchanged.
        return func(tensor, hook)
    ranks = engine.ranks

    def on_whole(gradient: Tensor) -> Tensor | None:
        changed = hook(ranks.gather(gradient, part))
        return None if changed is None else cut(changed, part, ranks.rank, ranks.size)

    return func(tensor, on_whole)


# FSDP2 reads it to warn of outputs that are views.
def _view_base(engine: OnParts, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return func(*args)
