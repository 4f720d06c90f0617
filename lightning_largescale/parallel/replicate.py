"""The whole module on every device, gradients averaged: torch's DistributedDataParallel.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_largescale import compat
from lightning_largescale.parallel.rows import rows_of
from lightning_largescale.workload.kinds import EVERYWHERE, is_plain


class Replica:
    """Averages the gradients of a module over all ranks in backward; kept beside the module, which stays as it is.

    Parameters that a step does not use keep no gradient, as in a plain run: the module may use others in each step, and
    on each rank. Which are trainable may change between steps, on all ranks alike.

    Args:
        module: on `device`, its values equal on all ranks.
        device: of this rank.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._trained: list[nn.Parameter] = []
        self._wrapper: DistributedDataParallel | None = None

    def run(self, step: Callable[[], Any], *, reduce_output: bool) -> Any:
        """Run `step`, the module's: a collective where other parameters are trainable than in the step before.

        Args:
            step: a step without arguments.
            reduce_output: the next backward starts from what `step` returns, else at `prepare`.
        """
        wrapper = self._current()
        if wrapper is None:
            return step()
        if reduce_output:
            return wrapper(step)

        def detached() -> Any:
            result = step()
            # Or the wrapper would expect a backward from the output, and complain when none came.
            wrapper.require_backward_grad_sync = False
            return result

        try:
            return wrapper(detached)
        finally:
            wrapper.require_backward_grad_sync = True

    def prepare(self, loss: Tensor) -> None:
        """Make ready for a backward from `loss` inside a step."""
        if self._wrapper is not None:
            prepare_for_backward(self._wrapper, loss)

    def forget_step(self) -> None:
        """Make ready for a step after one that ended halfway; the next step is a collective."""
        self._trained, self._wrapper = [], None
        # Until the old wrapper is gone its hooks would join in the next backward.
        gc.collect()

    def no_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Within, backward keeps its gradients unreduced, without communication."""
        wrapper = self._current()
        return contextlib.nullcontext() if wrapper is None else wrapper.no_sync()

    def _current(self) -> DistributedDataParallel | None:
        """The wrapper of what is trainable now, since torch's knows only what was when it was made."""
        parameters = (parameter for parameter in self._module.parameters() if rows_of(parameter) is None)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._trained = trained
            self._wrapper = _wrap(self._module, self._device) if trained else None
        return self._wrapper


def _wrap(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    on_cuda = device.type == "cuda"
    call = _Call(module)
    # Rows of tables are each rank's own, and so are their gradients.
    left_out = [name for name, one in call.named_parameters() if rows_of(one) is not None or not is_plain(one)]
    # torch tells other ranks only what is plain and dense, in every forward; what is not was made equal at setup.
    left_out += [name for name, one in call.named_buffers() if not is_plain(one) or one.dtype not in EVERYWHERE]
    compat.ignore_parameters(call, left_out)
    # Buckets are made on a stream of their own so that the default one does not hold their memory.
    with torch.cuda.stream(torch.cuda.Stream()) if on_cuda else contextlib.nullcontext():  # type: ignore[no-untyped-call]
        return DistributedDataParallel(
            call,
            device_ids=[device.index] if on_cuda else None,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            init_sync=False,
        )


class _Call(nn.Module):
    """A module whose forward is whatever it is given, over the parameters of another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # Looking for unused parameters and finding none makes torch warn, on standard error, past Python's filters.
        device = next(module.parameters()).device
        self.never_used = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()
