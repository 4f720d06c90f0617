"""Replicate the module on every device and average gradients, by torch's DistributedDataParallel and beyond it.

DistributedDataParallel averages the gradients of the parameters that were trainable when it was made, and expects each
gradient once in a backward. It gets only parameters that were seen to fit this. The gradients of all others, such as
parameters that become trainable within a step and those of reentrant activation checkpointing, are averaged after
backward.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.rows import rows_of
from lightning_largescale.techniques.replicate.averaging import Accumulations, Seen, agree, average_gradients
from lightning_largescale.workload.kinds import EVERYWHERE, is_plain

# Part of torch's error for a gradient that comes after it was reduced, or after it was taken for unused.
_CAME_AGAIN = "mark a variable ready only once"


class Replica:
    """Averages the gradients of a module over all ranks in backward; the module itself is not changed.

    A parameter that has a gradient after a backward on any rank gets the average over all ranks. The others get none,
    as in a plain run. The trainable and used parameters may differ between steps and between ranks.

    Args:
        module: the module on `device`, its values equal on all ranks.
        device: this rank's device.
        watch_all: whether to detect backwards that `prepare` does not announce.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, watch_all: bool = False) -> None:
        self._module, self._device, self._watch_all = module, device, watch_all
        # Row-sharded tables and their gradients are local to each rank.
        self._parameters = [one for one in module.parameters() if rows_of(one) is None and _is_differentiable(one)]
        self._known: set[int] = set()
        self._wrapper: DistributedDataParallel | None = None
        self._anchored: Tensor | None = None
        self._forget()

    def run(self, step: Callable[[], Any]) -> Any:
        """Run `step`; its gradients are averaged during or after the backward that `prepare` announces.

        Args:
            step: a step of the module, without arguments.
        """
        wrapper = self._current()
        synchronizes = wrapper.require_backward_grad_sync

        def prepared_later() -> Any:
            result = step()
            # Otherwise the wrapper would expect a backward from the output, and raise when none came.
            wrapper.require_backward_grad_sync = False
            return result

        try:
            return wrapper(prepared_later)
        finally:
            wrapper.require_backward_grad_sync = synchronizes

    def prepare(self, loss: Tensor) -> None:
        """Prepare for a backward from `loss`, which `finish` follows."""
        wrapper = self._current()
        self._accumulations.start(loss)
        anchor = self._call.anchor()
        prepare_for_backward(wrapper, (loss, anchor))
        self._anchored = anchor if wrapper.require_backward_grad_sync else None

    def finish(self) -> None:
        """Average the gradients that backward has not averaged; a collective, except within `no_reduction`."""
        self._accumulations.end()
        anchored, self._anchored = self._anchored, None
        if anchored is None:
            return
        anchored.backward()  # type: ignore[no-untyped-call]
        self._accumulations.outside = False
        others = [one for one in self._parameters if self._looks_again or id(one) not in self._known]
        if others:
            self._average(others)

    def finish_within(self) -> None:
        """Call `finish` at the end of a backward that accumulated gradients.

        The user's own `backward` may use the gradients after that.
        """
        if self._anchored is not None and self._accumulations.has_any:
            self.finish()

    def look_again(self) -> None:
        """Make the next backward find out again which parameters are trained."""
        self._looks_again = True

    @property
    def unreduced(self) -> bool:
        """Return whether there are gradients of a backward that was not announced; always False without `watch_all`."""
        wrapper = self._current()
        return self._watch_all and self._accumulations.outside and wrapper.require_backward_grad_sync

    def forget_step(self) -> None:
        """Prepare for a step after one that failed."""
        self._forget()
        # The old wrapper's hooks would run in the next backward.
        gc.collect()

    def close(self) -> None:
        """Remove all hooks from the parameters."""
        self._know(set())

    def no_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward leaves its gradients unreduced, without communication."""
        return self._current().no_sync()

    def _average(self, parameters: list[nn.Parameter]) -> None:
        seen = agree(parameters, self._accumulations.reentered, self._device)
        found = list(zip(parameters, seen, strict=True))
        average_gradients((one, how) for one, how in found if how.used and id(one) not in self._known)
        self._reentered.update(id(one) for one, how in found if Seen.REENTERED in how)
        self._sparse.update(id(one) for one, how in found if Seen.SPARSE in how)
        known = {id(one) for one, how in found if self._is_to_be_known(id(one), how)}
        if not self._looks_again:
            known |= self._known
        self._looks_again = False
        if known != self._known:
            self._know(known)

    def _is_to_be_known(self, parameter: int, seen: Seen) -> bool:
        """Return whether gradients of a parameter are to be averaged within backward from now on."""
        if parameter in self._reentered or parameter in self._sparse:
            return False
        # Where some parameters are in reentrant checkpointing, unused ones may be too.
        expected = parameter in self._known or not self._reentered
        return seen.used or (Seen.TRAINABLE in seen and expected)

    def _forget(self) -> None:
        self._reentered: set[int] = set()
        # DistributedDataParallel needs sparse gradients from every rank in every step.
        self._sparse = {id(part.weight) for part in self._module.modules() if _is_sparse(part)}
        self._looks_again = True
        self._anchored = None
        self._know(set())

    def _know(self, known: set[int]) -> None:
        """Discard the wrapper; the next one averages the gradients of the parameters `known`, given by id."""
        if self._wrapper is not None:
            self._accumulations.stop()
            self._wrapper = None
            if self._known:
                # The gradients in its buckets would have their memory twice until then.
                gc.collect()
        self._known = known

    def _current(self) -> DistributedDataParallel:
        if self._wrapper is None:
            self._call = _FunctionModule(self._module, self._device)
            self._wrapper = _wrap(self._call, self._known, self._device)
            watched = (one for one in self._parameters if self._watch_all or id(one) not in self._known)
            self._accumulations = Accumulations(watched)
        return self._wrapper


@contextlib.contextmanager
def told_of_reentry() -> Generator[None, None, None]:
    """Context that turns DistributedDataParallel's error about a reentrant backward into a PlanError.

    Raises:
        PlanError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if _CAME_AGAIN not in str(error):
            raise
        raise PlanError(
            "a parameter got its gradient from a backward within the backward for the first time after it had been"
            " trained without, as torch.utils.checkpoint with use_reentrant=True does it; call it with"
            " use_reentrant=False, or from the first step on."
        ) from error


def _wrap(call: _FunctionModule, known: set[int], device: torch.device) -> DistributedDataParallel:
    on_cuda = device.type == "cuda"
    left_out = [name for name, one in call.named_parameters() if rows_of(one) is not None or not is_plain(one)]
    # torch broadcasts buffers in every forward, only plain and dense ones; the others were made equal at setup.
    left_out += [name for name, one in call.named_buffers() if not is_plain(one) or one.dtype not in EVERYWHERE]
    compat.ignore_parameters(call, left_out)
    # On the compute stream: this copies existing gradients to the buckets.
    with _trainable(call.module.parameters(), known):
        return DistributedDataParallel(
            call,
            device_ids=[device.index] if on_cuda else None,
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
            init_sync=False,
        )


@contextlib.contextmanager
def _trainable(parameters: Iterable[nn.Parameter], known: set[int]) -> Generator[None, None, None]:
    """Context in which only the `known` parameters are trainable: DistributedDataParallel takes the trainable ones."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters if _is_differentiable(parameter)]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in known)
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def _is_differentiable(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _is_sparse(part: nn.Module) -> bool:
    return isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse


class _FunctionModule(nn.Module):
    """A module whose forward calls the function that it receives, with another module's parameters as its own."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module = module
        # Looking for unused parameters and finding none makes torch warn, on standard error, past Python's filters.
        self.never_used = nn.Parameter(torch.zeros(1, device=device))
        self.always_used = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()

    def anchor(self) -> Tensor:
        """Return a tensor to run backward from after the loss's backward.

        If none of its parameters got a gradient, DistributedDataParallel would leave the other ranks waiting.
        """
        self.always_used.grad = None
        return self.always_used.sum()
