"""Gradient release: update each block's parameters during backward, and free the block's gradients.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from lightning_largescale.errors import PlanError
from lightning_largescale.offload.gradient_arrivals import Arrivals
from lightning_largescale.offload.paged_optimizer import PagedOptimizer


class Release:
    """Update of each block's parameters as soon as the block's gradients are complete, until `stop`.

    The gradients are freed after the update.

    Args:
        optimizer: The optimizer of all parameters.
        label_of: The block of each parameter; parameters of no block are left to the optimizer's step.
        prepare: Called with the parameters whose gradients are complete, before they are updated.
        copied: As for `Arrivals`.
    """

    def __init__(
        self,
        optimizer: PagedOptimizer,
        label_of: Mapping[Tensor, str],
        prepare: Callable[[Sequence[Tensor]], None] = lambda parameters: None,
        copied: Iterable[nn.Module] = (),
    ) -> None:
        self._optimizer, self._prepare = optimizer, prepare
        self._waiting: list[Tensor] = []
        # The block that followed each block in the previous step.
        self._following: dict[str, str] = {}
        self._members: dict[str, list[Tensor]] = {}
        self._last: str | None = None
        self._done: set[Tensor] = set()
        self._arrivals = Arrivals(label_of, self._arrived, self._update, copied)

    def end_backward(self) -> None:
        """Update the parameters whose gradients arrived last."""
        self._arrivals.end()

    def end_step(self) -> None:
        """End the step, so that every parameter may be updated again."""
        self._done.clear()
        self._last = None

    def forget(self) -> None:
        """Reset after a step that raised."""
        self._arrivals.forget()
        self._waiting.clear()
        self._done.clear()
        self._last = None

    def stop(self) -> None:
        """Stop updating parameters in backward."""
        self._arrivals.stop()

    def _arrived(self, parameter: Tensor) -> None:
        if parameter in self._done:
            raise PlanError(
                "release_gradients=True has updated a parameter whose gradient is computed once more in the same step;"
                " a plan for steps with several backwards is release_gradients=False."
            )
        self._waiting.append(parameter)

    def _update(self, label: str) -> None:
        parameters, self._waiting = self._waiting, []
        self._prepare(parameters)
        self._optimizer.step_on({*parameters})
        if self._last is not None:
            self._following[self._last] = label
        self._last, self._members[label] = label, parameters
        self._optimizer.expect({*self._members.get(self._following.get(label, ""), ())})
        self._done.update(parameters)
        for parameter in parameters:
            # Gradients of parameters that the optimizer does not have are left to the code that computes them.
            if parameter in self._optimizer.paged.entries:
                parameter.grad = None
