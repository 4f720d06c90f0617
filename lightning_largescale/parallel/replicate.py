"""The whole module on every device, gradients averaged: torch's DistributedDataParallel.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replica:
    """Averages the gradients of a module over all ranks in backward; kept beside the module, which stays as it is.

    Parameters that a step does not use keep no gradient, as in a plain run: the module may use others in each step, and
    on each rank.

    Args:
        module: on `device`, its values equal on all ranks, with a trainable parameter.
        device: of this rank.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # Buckets are made on a stream of their own so that the default one does not hold their memory.
        with torch.cuda.stream(torch.cuda.Stream()) if on_cuda else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            self._wrapper = DistributedDataParallel(
                _Call(module),
                device_ids=[device.index] if on_cuda else None,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                init_sync=False,
            )

    def run(self, step: Callable[[], Any], *, reduce_output: bool) -> Any:
        """Run `step`, the module's.

        Args:
            step: a step without arguments.
            reduce_output: the next backward starts from what `step` returns, else at `prepare`.
        """
        if reduce_output:
            return self._wrapper(step)

        def detached() -> Any:
            result = step()
            # Or the wrapper would expect a backward from the output, and complain when none came.
            self._wrapper.require_backward_grad_sync = False
            return result

        try:
            return self._wrapper(detached)
        finally:
            self._wrapper.require_backward_grad_sync = True

    def prepare(self, loss: Tensor) -> None:
        """Make ready for a backward from `loss` inside a step."""
        prepare_for_backward(self._wrapper, loss)

    def no_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Within, backward keeps its gradients unreduced, without communication."""
        return self._wrapper.no_sync()


def replicate_module(module: nn.Module, device: torch.device) -> Replica | None:
    """What averages the gradients of `module`; None where nothing is trainable."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    return Replica(module, device)


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
