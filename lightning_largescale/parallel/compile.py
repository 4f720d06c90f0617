"""torch.compile of every repeated block: one graph, compiled once, serves all blocks of a class.

Source: torch.compile, "Regional compilation"; torchtitan, `parallelize_llama`: recompute, then compile, then shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.forward import Forward, replacements
from lightning_largescale.parallel.parameter_access import plain_leaves
from lightning_largescale.workload.blocks import find_blocks


def check_compile(given: Any) -> None:
    """Raise PlanError unless `given` is a bool or the arguments of torch.compile."""
    if not isinstance(given, bool | Mapping):
        raise PlanError(
            f"compile={given!r} is not accepted; give True, False, or the arguments of torch.compile as a dict, such as"
            " {'mode': 'max-autotune'}."
        )


def compile_blocks(module: nn.Module, options: Mapping[str, Any]) -> Callable[[], None]:
    """Compile the forward of every repeated block of `module`.

    Recompute, applied before, is compiled with the block. The hooks that unshard its parameters, registered after, stay
    outside of the graph. Names and state_dict keys stay; a block that the user compiled is not changed.

    Args:
        module: the module, with repeated blocks.
        options: arguments of `torch.compile`, as `{"backend": "aot_eager"}`.

    Returns:
        A function that restores the blocks' forward.

    Raises:
        PlanError: `module` has no repeated blocks.
    """
    repeated = find_blocks(module).values()
    if not repeated:
        raise PlanError(
            f"compile needs repeated blocks and {type(module).__name__} has none; leave it out, and give the Trainer"
            " torch.compile(module)."
        )
    for block in repeated:
        if compat.compiled_module(block) is block:
            _Compiled(block, options).replace()
    return partial(_Compiled.restore, module)


def is_compiled_block(module: nn.Module) -> bool:
    """Return whether `compile_blocks` compiled `module`, whose own hooks are not traced."""
    return any(isinstance(one, _Compiled) for one in replacements(module))


def traced_modules(module: nn.Module) -> set[nn.Module]:
    """Return the modules among `module` and its submodules whose forward the user's torch.compile traces."""
    compiled = [part for part in module.modules() if compat.is_compiled(part)]
    return {inner for part in compiled for inner in part.modules()}


class _Compiled(Forward):
    """A block's compiled forward; hooks stay outside, where they break no graph."""

    def __init__(self, block: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__(block)
        self._options = options

    def wrap(self, original: Callable[..., Any]) -> None:
        """Compile `original`."""
        super().wrap(original)
        self._compiled = torch.compile(original, **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with plain_leaves(self._module):
            return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the compiled function would compute with the parameters of the block that was copied.
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.wrap(self.original)
