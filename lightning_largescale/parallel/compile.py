"""torch.compile of every repeated block: one graph, compiled once, serves all blocks of a class.

Source: torch.compile, "Regional compilation"; torchtitan, `parallelize_llama`: recompute, then compile, then shard.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.forward import Forward
from lightning_largescale.workload.blocks import find_blocks


def check_compile(given: Any) -> None:
    """Raise PlanError unless `given` says whether to compile, or with which arguments."""
    if not isinstance(given, bool | Mapping):
        raise PlanError(
            f"compile={given!r} is not accepted; give True, False, or the arguments of torch.compile as a dict, such as"
            " {'mode': 'max-autotune'}."
        )


def compile_blocks(module: nn.Module, options: Mapping[str, Any]) -> Callable[[], None]:
    """Compile the forward of every repeated block of `module`; what undoes it.

    Recomputation, applied before, is compiled with the block, and what gathers its parameters, applied after, stays
    outside of the graph. Names and state_dict keys stay; a block that is compiled already is left as it is.

    Args:
        module: with repeated blocks.
        options: arguments of `torch.compile`, as `{"backend": "aot_eager"}`.

    Raises:
        PlanError: `module` has no repeated blocks.
    """
    repeated = find_blocks(module).values()
    if not repeated:
        raise PlanError(
            f"compile needs repeated blocks and {type(module).__name__} has none; leave it out, and give the Trainer"
            " torch.compile(module)."
        )
    blocks = [block for block in repeated if compat.compiled_module(block) is block]
    before = [(block, vars(block).get("forward")) for block in blocks]
    for block in blocks:
        # The bound method is replaced, not the module: hooks stay outside, where they break no graph.
        block.forward = _Compiled(block.forward, options)

    def undo() -> None:
        for block, own in before:
            del block.forward
            if own is not None:
                block.forward = own

    return undo


def traced_modules(module: nn.Module) -> set[nn.Module]:
    """`module` and those in it whose forward torch.compile traces."""
    compiled = [part for part in module.modules() if compat.is_compiled(part) or _runs_compiled(part)]
    return {inner for part in compiled for inner in part.modules()}


def _runs_compiled(module: nn.Module) -> bool:
    """Return whether `compile_blocks` compiled `module`, whatever wraps its forward since."""
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        forward = forward.original
    return isinstance(forward, _Compiled)


class _Compiled:
    """A block's forward, compiled; a copy of the block gets its own, where a function would compute as the block."""

    def __init__(self, original: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._original, self._options = original, options
        self._compiled = torch.compile(original, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled(copy.deepcopy(self._original, memo), self._options)
