"""Which modules read their parameters alone, as a step shows it."""

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
    """Follows some modules through a step: each forward is a segment of its own, unless a block runs it, and operations
    that take their parameters at other times are noted. In backward they may: autograd holds what it saved.

    Args:
        modules: by name; none inside another.
        owned: the parameters of each that nothing but it may read.
    """

    def __init__(self, modules: Mapping[str, nn.Module], owned: Mapping[str, Iterable[torch.Tensor]]) -> None:
        self._modules = modules
        self._owners = {key: name for name, own in owned.items() for tensor in own for key in storage_keys(tensor)}
        self._running: list[str] = []
        self._ran: set[str] = set()
        self._read: set[str] = set()

    @property
    def closed(self) -> frozenset[str]:
        """Names of those that ran and whose parameters nothing else read."""
        return frozenset(self._ran - self._read)

    def see(self, inputs: Iterable[torch.Tensor]) -> None:
        """Note what an operation of the forward takes."""
        if not self._owners:
            return
        for tensor in inputs:
            for key in storage_keys(tensor):
                owner = self._owners.get(key)
                if owner is not None and owner not in self._running:
                    self._read.add(owner)

    @contextmanager
    def watching(self, log: SegmentLog) -> Iterator[None]:
        """Under this context the step runs."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                enter = module.register_forward_pre_hook(partial(self._enter, log, name))
                leave = module.register_forward_hook(partial(self._leave, log, name), always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def _enter(self, log: SegmentLog, name: str, *_: Any) -> None:
        if log.block is None:
            log.enter_block(name)
        self._running.append(name)
        self._ran.add(name)

    def _leave(self, log: SegmentLog, name: str, *_: Any) -> None:
        if name in self._running:
            self._running.remove(name)
        if log.block == name and name not in self._running:
            log.leave_block()


def storage_keys(tensor: torch.Tensor) -> list[int]:
    """By which the storages of `tensor` are known."""
    return [id(part.untyped_storage()) for part in compat.dense_parts(tensor)]
