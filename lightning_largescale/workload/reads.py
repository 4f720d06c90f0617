"""Find which modules FSDP may all-gather separately, by watching a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat
from lightning_largescale.workload.segments import SegmentLog


class Reads:
    """Watches modules through a step; each forward is a segment of its own, unless a block runs it.

    A module may be all-gathered separately if only its own forward reads its parameters, and only its own backward
    after the gradient of its output has arrived, which is when FSDP2 unshards. Nor may the module write into its
    inputs, or other code into a view that it returned: FSDP2 inserts autograd nodes there.

    Args:
        modules: the modules by name; none contains another.
        owned: by module name, the parameters that only this module may read.
    """

    def __init__(self, modules: Mapping[str, nn.Module], owned: Mapping[str, Iterable[torch.Tensor]]) -> None:
        self._modules = modules
        self._owners = {key: name for name, own in owned.items() for tensor in own for key in storage_keys(tensor)}
        self._running: list[str] = []
        self._ran: set[str] = set()
        self._refused: set[str] = set()
        # Modules whose output gradient has arrived. By storage, the module whose input must not be written into during
        # its forward, and the module whose output must not be written into after it.
        self._in_backward: set[str] = set()
        self._given: dict[int, str] = {}
        self._returned: dict[int, str] = {}

    @property
    def closed(self) -> frozenset[str]:
        """Names of the modules that may be all-gathered separately."""
        return frozenset(self._ran - self._refused)

    def see(self, inputs: Iterable[torch.Tensor], written: Iterable[torch.Tensor], *, in_backward: bool) -> None:
        """Record the inputs of an operation, and those that it writes into."""
        if not self._owners:
            return
        allowed = {*self._running, *(self._in_backward if in_backward else ())}
        taken = {self._owners[key] for tensor in inputs for key in storage_keys(tensor) if key in self._owners}
        self._refused |= taken - allowed
        for tensor in written:
            for key in storage_keys(tensor):
                if self._given.get(key) in self._running:
                    self._refused.add(self._given[key])
                if key in self._returned:
                    self._refused.add(self._returned[key])

    @contextmanager
    def watching(self, log: SegmentLog) -> Iterator[None]:
        """Hook the modules; the step runs inside this context."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                enter = module.register_forward_pre_hook(partial(self._enter, log, name), with_kwargs=True)
                leave = module.register_forward_hook(partial(self._leave, log, name), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def _enter(self, log: SegmentLog, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if log.block is None:
            log.enter_block(name)
        self._running.append(name)
        self._ran.add(name)
        given = _with_gradients((args, kwargs))
        if any(compat.is_transformed(tensor) for tensor in given):
            # FSDP2 does not see derivatives that torch.func takes inside the step.
            self._refused.add(name)
            return
        for tensor in given:
            self._given |= dict.fromkeys(storage_keys(tensor), name)

    def _leave(self, log: SegmentLog, name: str, _: nn.Module, args: Any, output: Any) -> None:
        if name in self._running:
            self._running.remove(name)
        if log.block == name and name not in self._running:
            log.leave_block()
        for tensor in _with_gradients(output) if name not in self._refused else ():
            tensor.register_hook(lambda gradient: self._in_backward.add(name))  # type: ignore[no-untyped-call]
            if compat.view_base(tensor) is not None:
                self._returned |= dict.fromkeys(storage_keys(tensor), name)


def _with_gradients(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in compat.leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def storage_keys(tensor: torch.Tensor) -> list[int]:
    """Return the ids that identify the storages of `tensor`."""
    return [id(part.untyped_storage()) for part in compat.dense_parts(tensor)]
