"""Arrival of gradients during backward, and the completion of each block's gradients.

In backward, all gradients of a block are complete before the last gradient of the preceding block. So when a gradient
of another block arrives, the gradients that arrived before it can be offloaded or used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_largescale import compat

# A parameter's own gradient: the parameter's class may override `grad`.
GRADIENT: Any = Tensor.grad


class Arrivals:
    """Callbacks for the arrival of gradients and for the completion of a block's gradients, until `stop`.

    Gradients that FSDP2 copies from a CUDA device to DRAM are reported when gradients of another block have followed,
    so that the copies overlap with computation.

    Args:
        label_of: The block of each parameter to watch.
        arrived: Called with the parameter of each gradient that arrives.
        complete: Called with a block when a gradient of another block has followed, and at the end of backward.
        copied: Modules that `fully_shard` was applied to and whose shards are in DRAM while a CUDA device computes.
    """

    def __init__(
        self,
        label_of: Mapping[Tensor, str],
        arrived: Callable[[Tensor], None],
        complete: Callable[[str], None],
        copied: Iterable[nn.Module] = (),
    ) -> None:
        self._label_of, self._arrived, self._complete = label_of, arrived, complete
        self._label: str | None = None
        self._copying: list[tuple[Sequence[Tensor], Callable[[], object]]] = []
        # The stream on which gradients on the device arrived, and on which their memory is freed.
        self._stream: Any = None
        self._undo = contextlib.ExitStack()
        told: set[Tensor] = set()
        for module in copied:
            self._undo.callback(compat.around_reductions(module, self._reduced))
            told.update(parameter for parameter, _ in compat.shards_of(module))
        self._copies = bool(told)
        for parameter in label_of:
            if parameter.requires_grad and parameter not in told:
                handle = parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
                self._undo.callback(handle.remove)

    def end(self) -> None:
        """End the backward: no more gradients arrive in it."""
        label, self._label = self._label, None
        copying, self._copying = self._copying, []
        if label is None:
            return
        for parameters, wait in copying:
            wait()
            for parameter in parameters:
                # `autograd.grad` has taken the gradients of its inputs away since.
                if GRADIENT.__get__(parameter) is not None:
                    self._arrived(parameter)
        self._complete(label)

    def forget(self) -> None:
        """Abandon a backward that did not finish."""
        self._label = None
        self._copying.clear()

    def stop(self) -> None:
        """Stop watching gradients."""
        self._undo.close()

    def _note(self, parameter: Tensor) -> None:
        self._begin(self._label_of[parameter])
        if self._copies:
            self._stream = torch.cuda.current_stream()
        self._arrived(parameter)

    def _reduced(self, parameters: Sequence[Tensor], wait: Callable[[], object]) -> None:
        watched = [parameter for parameter in parameters if parameter in self._label_of]
        if not watched:
            return
        stream, self._stream = self._stream, None
        if stream is None:
            self._begin(self._label_of[watched[0]])
        else:
            # The previous block's gradients are on the device, in memory of the stream that reduced them.
            with torch.cuda.stream(stream):
                self._begin(self._label_of[watched[0]])
            torch.cuda.current_stream().wait_stream(stream)
        self._copying.append((watched, wait))

    def _begin(self, label: str) -> None:
        if self._label not in (None, label):
            self.end()
        self._label = label
