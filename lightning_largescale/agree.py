"""Ranks that stop together: where one cannot go on, the others learn it before they would wait for it.

A rank that runs out of memory leaves the others in a collective that it will never enter. Here every collective,
whoever starts it (FSDP, DistributedDataParallel, a layer, a metric, the user), is preceded by one of a few numbers:
whether all ranks are coming, and to the same. Too slow for training, good enough for trials.
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
_COLLECTIVES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
# In the same registries, and not entered by all ranks at once.
_OF_FEWER = {"send", "recv_", "recv_any_source_", "wait_tensor", "_wrap_tensor_autograd"}


class _Outcome(IntEnum):
    """Of the ranks together: the greatest of any."""

    GOING = 0
    FINISHED = 1
    OUT_OF_MEMORY = 2
    FAILED = 3


def run_together(
    function: Callable[[], _Result], *, device: torch.device, forget: Callable[[], None]
) -> _Result | None:
    """Run `function` until it ends on any rank: a collective where there are several. How it ended there is how it ends
    on all.

    Args:
        function: it enters the same collectives on all ranks, until the data of one ends.
        device: of this rank.
        forget: called, on all ranks, where `function` did not finish on this rank: makes good what is half done.

    Returns:
        What `function` returns; None where it had not finished when another rank's had.

    Raises:
        RuntimeError: a rank ran out of memory; on the others in words that Lightning takes for the same.
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
    """What `function` returns or raises."""
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
    """Within, no collective begins before all ranks are known to enter it.

    Attributes:
        outcome: GOING until a rank has stopped.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outcome = _Outcome.GOING
        # Made now: there may be no memory for it later.
        self._numbers = torch.zeros(3, dtype=torch.int64, device=device)

    @classmethod
    @override
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays so: uncompiled it would need other memory."""
        return True

    def settle(self, own: _Outcome, to: str = "") -> _Outcome:
        """The outcome, this rank's being `own`: a collective, until a rank has stopped.

        Ranks that are on their way to different collectives, by the names `to`, have finished: the data of one ended,
        and it is in its next epoch.
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
            # It comes back with the operations on its shards, and collectives among them.
            return NotImplemented
        if _is_collective(function) and self.settle(_Outcome.GOING, function.name()) is not _Outcome.GOING:
            raise RuntimeError("another rank has stopped")
        return function(*args, **(kwargs or {}))


def _is_collective(function: Any) -> bool:
    namespace, _, name = function.name().partition("::")
    return namespace in _COLLECTIVES and name.partition(".")[0] not in _OF_FEWER
