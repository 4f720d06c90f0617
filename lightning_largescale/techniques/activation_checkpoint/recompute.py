"""Activation checkpointing: keep a block's input and recompute its forward in backward.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4; torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.forward import Forward, replacements
from lightning_largescale.parallel.parameter_access import watched
from lightning_largescale.plan import Plan
from lightning_largescale.techniques.activation_checkpoint.selective_recompute import Contexts, keep_products
from lightning_largescale.workload.blocks import find_blocks


def apply_recompute(module: nn.Module, plan: Plan) -> None:
    """Make the repeated blocks of `module` that `plan` names, or all of them, recompute their activations.

    Results equal those of the plain run bit for bit, including dropout and running statistics. The module is changed
    in place; its names and state_dict keys stay. Calling this twice has the effect of one call, and
    `remove_recompute` undoes it.

    Raises:
        PlanError: the plan asks for recompute, and `module` has no repeated blocks or lacks one that the plan names.
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
    plan.check_blocks(blocks)
    copies: _Copies = WeakTensorKeyDictionary()
    for name in plan.checkpointed_blocks or blocks:
        _Recomputed(blocks[name], copies, keeps=plan.checkpointed_operations == "cheap").replace()


def remove_recompute(module: nn.Module) -> None:
    """Undo `apply_recompute`: restore every block's forward, so that `module` can be copied and pickled again."""
    _Recomputed.restore(module)


def recomputes(module: nn.Module) -> bool:
    """Return whether `apply_recompute` is in force on any block of `module`."""
    return any(isinstance(one, _Recomputed) for part in module.modules() for one in replacements(part))


# Copies of buffers, each with the version that was copied.
_Copies = MutableMapping[Tensor, tuple[int, Tensor]]
# The kernels of these modules write into buffers without raising the version counter.
_WRITES_UNSEEN = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


class _Recomputed(Forward):
    """A block's forward under activation checkpointing.

    The forward updates buffers (running statistics, codebooks) only once: the recomputed forward runs on copies of
    their earlier values.

    Args:
        block: the block.
        copies: copies of buffers, shared by all blocks so that a constant is copied once.
        keeps: whether to keep the results of matrix products instead of recomputing them.
    """

    def __init__(self, block: nn.Module, copies: _Copies, *, keeps: bool) -> None:
        super().__init__(block)
        self._copies, self._keeps = copies, keeps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        before = {
            (owner, name): self._as_it_is(owner, tensor)
            for owner in self._module.modules()
            for name, tensor in owner.named_buffers(recurse=False)
        }
        contexts = keep_products if self._keeps else noop_context_fn
        if before:
            contexts = partial(_bound_in_backward, contexts, before)
        if not torch.compiler.is_compiling():
            contexts = partial(_writing_once, contexts, self._module)
        elif contexts is noop_context_fn:
            # torch.compile does not accept contexts that do nothing.
            return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
        return checkpoint(self.original, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def _as_it_is(self, owner: nn.Module, tensor: Tensor) -> Tensor:
        if isinstance(owner, _WRITES_UNSEEN):
            return tensor.clone()
        version = compat.version(tensor)
        copied = self._copies.get(tensor)
        if copied is None or copied[0] != version:
            copied = self._copies[tensor] = (version, tensor.clone())
        return copied[1]


def _writing_once(contexts: Callable[[], Contexts], block: nn.Module) -> Contexts:
    """Return `contexts`, the second of which raises on writes into the parameters of `block`."""
    first, again = contexts()
    return first, _WritesOnce(block, again)


class _WritesOnce:
    """Context of a recomputed forward, around `inner`: raises on writes into parameters, which would happen twice."""

    def __init__(self, block: nn.Module, inner: AbstractContextManager[Any]) -> None:
        self._block, self._inner = block, inner

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._before = self._writes()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        # Also on an error, since recompute stops with one once backward has all it needs.
        for name, count in self._writes().items():
            if count != self._before.get(name, count):
                raise PlanError(
                    f"{type(self._block).__name__.removeprefix('FSDP')} writes into its parameter {name!r} in forward,"
                    " which activation_checkpointing runs twice; write it in training_step, or use"
                    " activation_checkpointing='none'."
                )

    def _writes(self) -> dict[str, object]:
        """Return, by parameter name, a value that changes with each write into the parameter."""
        counts: dict[str, object] = {}
        for name, parameter in self._block.named_parameters():
            found = watched(parameter)
            counts[name] = parameter.data_ptr(), compat.version(parameter) if found is None else found.versions()
        return counts


_Buffers = dict[tuple[nn.Module, str], Tensor]


def _bound_in_backward(contexts: Callable[[], Contexts], before: _Buffers) -> Contexts:
    """Return `contexts`, within the second of which modules have the buffers of `before`."""
    first, again = contexts()
    return first, _Bound(before, again)


class _Bound:
    """Context, around `inner`, in which modules have `buffers` in place of their own; entered in each backward."""

    def __init__(self, buffers: _Buffers, inner: AbstractContextManager[Any]) -> None:
        self._buffers, self._inner = buffers, inner
        self._first = {(owner, name): getattr(owner, name) for owner, name in buffers}
        self._versions = {place: compat.version(tensor) for place, tensor in self._first.items()}

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._present = {(owner, name): getattr(owner, name) for owner, name in self._buffers}
        self._set({place: self._again(*place, tensor) for place, tensor in self._buffers.items()})

    def __exit__(self, *error: Any) -> None:
        # First, since the inner context may raise.
        self._set(self._present)
        self._inner.__exit__(*error)

    def _again(self, owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """Return the buffer to recompute with: a copy if the block writes into it, since a later backward needs it."""
        present = self._present[owner, name]
        constant = present is self._first[owner, name] and compat.version(present) == self._versions[owner, name]
        return tensor if constant and not isinstance(owner, _WRITES_UNSEEN) else tensor.clone()

    @staticmethod
    def _set(buffers: _Buffers) -> None:
        for (owner, name), tensor in buffers.items():
            setattr(owner, name, tensor)
