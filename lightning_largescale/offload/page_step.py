"""One optimizer step over some pages: the optimizer holds their elements in place of its parameters.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2.2; Dettmers et al. 2023, "QLoRA", section 3 (paged
    optimizers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_largescale.dtensors import local_of
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.paged_state import PagedState, as_divided
from lightning_largescale.offload.pages import ParamEntry, ParamSlice
from lightning_largescale.offload.places import elements
from lightning_largescale.offload.store import Transfer
from lightning_largescale.optimizers.local_view import LocalView


class PageStep(LocalView):
    """A view in which an optimizer holds slices of parameters in place of the parameters.

    Args:
        optimizer: The optimizer, whose groups are emptied.
        paged: The pages of its state.
        made: Dictionary that receives the new state of each parameter.
    """

    def __init__(self, optimizer: Optimizer, paged: PagedState, made: dict[ParamEntry, dict[str, Any]]) -> None:
        super().__init__(optimizer)
        self._paged, self._made = paged, made
        self._lanes: Lanes | None = None
        self._brought: list[tuple[Tensor, Tensor]] = []
        self._slices: list[tuple[ParamEntry, Mapping[str, Tensor]]] = []

    def hold_slice(
        self,
        span: ParamSlice,
        values: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        lanes: Lanes | None,
    ) -> None:
        """Add a slice to the optimizer, with its state in `slots`, or copied from there to the device by `lanes`."""
        state = self._optimizer.state.get(span.entry.parameter)
        self._lanes = lanes or self._lanes
        # At the first step there is no state to copy; `store` takes what the step creates.
        if lanes is not None and state:
            kept, slots = slots, lanes.bring(slots)
            self._brought += [(kept[key], slot) for key, slot in slots.items()]
        found = self._state_of(span, state, slots, values.device) if state else None
        self._add(span.entry, values, gradient, slots, found)

    def hold_row(self, entry: ParamEntry) -> None:
        """Add a row of zeros in place of an empty shard, since not all optimizers can step on an empty tensor."""
        local = entry.local
        row = local.new_zeros((1, *local.shape[1:]))
        state = self._optimizer.state.get(entry.parameter, {})
        paged = entry.spec.dtypes
        found = {key: torch.zeros_like(row, dtype=paged[key]) if key in paged else one for key, one in state.items()}
        self._add(entry, row, torch.zeros_like(row), {}, found or None)

    def store(self) -> Transfer:
        """Store the values and state that the step computed.

        Returns:
            The transfer that copies state from the device back to its slots.
        """
        for (entry, slots), made in zip(self._slices, self.results(), strict=True):
            if made is not None:
                self._made[entry] = {key: self._kept(entry, key, value, slots) for key, value in made.items()}
        return Transfer() if self._lanes is None else self._lanes.fetch(self._brought)

    def _add(
        self,
        entry: ParamEntry,
        values: Tensor,
        gradient: Tensor,
        slots: Mapping[str, Tensor],
        state: dict[str, Any] | None,
    ) -> None:
        self.hold(self._paged.group_of[entry.parameter], entry.parameter, values, gradient, state)
        self._slices.append((entry, slots))

    def _state_of(
        self, span: ParamSlice, state: Mapping[str, Any], slots: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in state.items():
            slot = slots.get(key)
            if slot is not None and self._paged.is_paged(span.entry, value):
                if not self._paged.is_here(span.entry, key):
                    slot.copy_(elements(local_of(value), span))
                found[key] = slot
            else:
                found[key] = self._unpaged(value, span, device) if isinstance(value, Tensor) else value
        return found

    @staticmethod
    def _unpaged(value: Tensor, span: ParamSlice, device: torch.device) -> Tensor:
        """Return state that is not paged as a plain tensor, for the step on a slice."""
        local = local_of(value)
        if device.type == "cpu" != local.device.type:
            # The state is from an earlier run, in which the device stepped.
            return local.cpu()
        # Each of several slices counts its own steps.
        return local if span.whole else local.clone()

    def _kept(self, entry: ParamEntry, key: str, value: Any, slots: Mapping[str, Tensor]) -> Any:
        """Return the value that `optimizer.state` keeps between steps for a slice's new state `value`."""
        slot = slots.get(key)
        if not entry.local.numel() and key in entry.spec.dtypes:
            return as_divided(entry.parameter, value[:0])
        if slot is None or not isinstance(value, Tensor) or value.shape != slot.shape:
            # A scalar is not sharded, even if the parameter is a scalar too.
            return as_divided(entry.parameter, value) if isinstance(value, Tensor) and value.dim() else value
        if slot.device.type == "cpu" != value.device.type:
            self._brought.append((slot, value))
        elif value.data_ptr() != slot.data_ptr():
            slot.copy_(value)
        return as_divided(entry.parameter, self._paged.view(entry, key))
