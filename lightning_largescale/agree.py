"""Trials that end together on all ranks: if one rank stops, the others learn it before they wait for it.

A rank that runs out of memory leaves the others in a collective that it will never enter. Here every collective,
whoever starts it (FSDP, DistributedDataParallel, a layer, a metric, the user), is preceded by an all-reduce of three
numbers, which tells whether all ranks are about to enter the same collective. Too slow for training, fast enough for
trials.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.memory import is_oom_error
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_largescale import comm, compat
from lightning_largescale.hub import is_connection_loss

_Result = TypeVar("_Result")


class _Outcome(IntEnum):
    """The outcome of a trial; that of all ranks together is the greatest of any rank."""

    GOING = 0
    FINISHED = 1
    OUT_OF_MEMORY = 2
    FAILED = 3


def run_together(
    function: Callable[[], _Result], *, device: torch.device, forget: Callable[[], None]
) -> _Result | None:
    """Run `function` until it ends on any rank, and end it alike on all; a collective if there are several ranks.

    Args:
        function: the function to run; it enters the same collectives on all ranks, until the data of one rank ends.
        device: the device of this rank.
        forget: a function that restores the state after a half-done run; called unless `function` finished on this rank
            and no rank failed. Not called after a connection loss.

    Returns:
        The result of `function`; None if another rank finished first.

    Raises:
        RuntimeError: a rank ran out of memory; the other ranks raise a message that Lightning takes for the same.
        torch.distributed.DistError: another rank failed otherwise; that one raises its own error.
    """
    if comm.world_size() == 1:
        result, error = _attempt(function, contextlib.nullcontext())
        if error is not None:
            forget()
            raise error
        return result
    together = _Together(device)
    result, error = _attempt(function, together)
    if error is not None and is_connection_loss(error):
        raise error
    told = together.outcome is not _Outcome.GOING
    own = _Outcome.GOING if told else _outcome_of(error)
    outcome = together.settle(own)
    if own is _Outcome.FINISHED and outcome is _Outcome.FINISHED:
        return result
    forget()
    if outcome is _Outcome.FINISHED:
        return None
    if error is not None and own is outcome:
        raise error
    if outcome is _Outcome.OUT_OF_MEMORY:
        where = "CUDA out of memory" if device.type == "cuda" else "DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(f"{where}: on another rank")
    raise dist.DistError("another rank failed in the same step")


def _attempt(
    function: Callable[[], _Result], together: contextlib.AbstractContextManager[Any]
) -> tuple[_Result | None, Exception | None]:
    """Return the result of `function` and None, or None and its exception."""
    try:
        with together:
            return function(), None
    except Exception as error:
        if is_oom_error(error):
            # The frames of the traceback hold the tensors that took the memory.
            error.__context__ = None
            return None, error.with_traceback(None)
        return None, error


def _outcome_of(error: Exception | None) -> _Outcome:
    if error is None:
        return _Outcome.FINISHED
    return _Outcome.OUT_OF_MEMORY if is_oom_error(error) else _Outcome.FAILED


class _Together(compat.DispatchMode):  # type: ignore[no-untyped-call]
    """Context in which no collective begins before all ranks are known to enter it.

    Attributes:
        outcome: the outcome of all ranks together; GOING until a rank has stopped.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outcome = _Outcome.GOING
        # Allocated now: there may be no memory for it later.
        self._numbers = torch.zeros(3, dtype=torch.int64, device=device)

    @classmethod
    @override
    def ignore_compile_internals(cls) -> bool:
        """Return True, so that compiled code stays compiled: uncompiled it would use a different amount of memory."""
        return True

    def settle(self, own: _Outcome, to: str = "") -> _Outcome:
        """Return the outcome of all ranks together: a collective, until a rank has stopped.

        Ranks that are about to enter different collectives count as finished: the data of one ended, and it is in its
        next epoch.

        Args:
            own: the outcome of this rank.
            to: the name of the collective that this rank is about to enter.
        """
        if self.outcome is _Outcome.GOING:
            name = zlib.crc32(to.encode())
            for index, number in enumerate((own, name, -name)):
                self._numbers[index] = number
            comm.all_reduce(self._numbers, dist.ReduceOp.MAX)
            outcome, greatest, least = self._numbers.tolist()
            self.outcome = _Outcome(max(outcome, _Outcome.GOING if greatest == -least else _Outcome.FINISHED))
        return self.outcome

    @override
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # DTensor's own dispatch calls this again with the operations on its shards, collectives included.
            return NotImplemented
        if compat.is_collective(function) and self.settle(_Outcome.GOING, function.name()) is not _Outcome.GOING:
            raise RuntimeError("another rank has stopped")
        return function(*args, **(kwargs or {}))
