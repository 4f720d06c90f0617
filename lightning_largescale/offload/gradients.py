"""Gradient offload: keep gradients in another tier from when they are complete until the optimizer reads them.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.1.1.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.hardware.usage import let_rest
from lightning_largescale.offload.gradient_arrivals import GRADIENT, Arrivals
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.offloaded_parameters import GradientPlaces
from lightning_largescale.offload.paged_state import as_divided
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.tiers import aligned


@dataclass(eq=False)
class _Gone:
    """An offloaded gradient.

    Attributes:
        parameter: The parameter; its `grad` is `gradient` unless it was reassigned since.
        gradient: The tensor in the parameter's `grad`, which maps the file.
        norm: The gradient's norm; None if it was not computed or is no longer valid.
        version: The version of `gradient` that `norm` belongs to.
        changes: The deferred changes, which are applied when the gradient is read.
    """

    parameter: Tensor
    gradient: Tensor
    norm: Tensor | None
    version: int
    changes: list[Callable[[Tensor], object]] = field(default_factory=list)


class SpilledGradients(GradientPlaces):
    """Gradients in a store, from when they are complete until the optimizer reads them; active until `stop`.

    The `grad` of a parameter is then a tensor that maps the store's file. Clipping does not read the gradients: the
    norm of each is computed when it is offloaded, and scaling and clamping are deferred until the optimizer reads it.
    Other code that reads a gradient has them applied at once.

    Args:
        blocks: The parameters of each block, by name. Each has the same local shape as its gradient.
        store: The store that holds the gradients.
        norms: Whether to compute the norms.
        copied: As for `Arrivals`.

    Raises:
        PlanError: The disk has too little free space.
    """

    leave = True

    def __init__(
        self,
        blocks: Mapping[str, Sequence[Tensor]],
        store: Store,
        *,
        norms: bool,
        copied: Iterable[nn.Module] = (),
    ) -> None:
        self._norms = norms
        self._regions: dict[str, Region] = {}
        self._slots: dict[Tensor, tuple[Region, int]] = {}
        self._leaving: list[tuple[Region, Transfer]] = []
        # The keys are the ids of the gradients.
        self._gone: dict[int, _Gone] = {}
        for name, parameters in blocks.items():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            sizes = [aligned(local_of(parameter.detach()).nbytes) for parameter in trained]
            if not trained:
                continue
            region = self._regions[name] = Region(store, f"the gradients of {name}", sum(sizes))
            starts = itertools.accumulate(sizes, initial=0)
            self._slots |= {parameter: (region, start) for parameter, start in zip(trained, starts, strict=False)}
        label_of = {parameter: name for name, parameters in blocks.items() for parameter in parameters}
        self._arrivals = Arrivals(
            {parameter: label for parameter, label in label_of.items() if parameter in self._slots},
            self._arrived,
            self._complete,
            copied,
        )

    def end_backward(self) -> None:
        """Wait until all gradients that arrived are written.

        Raises:
            StoreError: A gradient could not be written.
        """
        self._arrivals.end()
        self._drain(0)

    def forget(self) -> None:
        """Reset after a step that raised."""
        self._arrivals.forget()
        self._leaving.clear()
        for region in self._regions.values():
            # A failed write was reported when it was waited for, and its values are not needed any more.
            with contextlib.suppress(StoreError):
                region.drop()
            region.drop()
        self._gone.clear()

    def stop(self) -> None:
        """Stop offloading; gradients stay in memory from now on."""
        self._arrivals.stop()

    def region_of(self, gradient: Tensor) -> Region | None:
        """Return the region of the store that holds `gradient`; None if it is in memory."""
        if not gradient.numel():
            return None
        return next((region for region in self._regions.values() if region.holds(gradient)), None)

    def changed(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Return `values`, read from `gradient`, after applying the gradient's deferred changes."""
        gone = self._gone.get(id(gradient))
        for change in () if gone is None else gone.changes:
            change(values)
        return values

    def settle(self) -> None:
        """Apply the deferred changes of all gradients now, for code that reads or changes the gradients."""
        for gone in self._gone.values():
            if gone.parameter.grad is gone.gradient:
                _make_changes(gone)

    def _arrived(self, parameter: Tensor) -> None:
        gradient = GRADIENT.__get__(parameter)
        assert gradient is not None
        own = local_of(gradient)
        if not own.numel():
            return
        region, start = self._slots[parameter]
        memory = region.tensor(own.dtype, own.shape, start)
        if own.data_ptr() != memory.data_ptr():
            if not region.in_dram and not self._kept(region):
                region.claim()
            memory.copy_(own)
            kept = as_divided(parameter, memory)
            GRADIENT.__set__(parameter, kept)
        else:
            kept = gradient
        for key in [key for key, gone in self._gone.items() if gone.parameter is parameter]:
            del self._gone[key]
        norm = torch.linalg.vector_norm(kept) if self._norms else None
        self._gone[id(kept)] = _Gone(parameter, kept, norm, _version(kept))
        if not region.in_dram:
            let_rest(memory)

    def _kept(self, region: Region) -> bool:
        """Return whether `region` holds gradients of earlier backwards."""
        held = (parameter.grad for parameter, (own, _) in self._slots.items() if own is region)
        return any(one is not None and region.holds(local_of(one)) for one in held)

    def _complete(self, name: str) -> None:
        region = self._regions[name]
        if region.in_dram:
            self._leaving.append((region, region.save()))
        self._drain(1)

    def _drain(self, most: int) -> None:
        while len(self._leaving) > most:
            region, transfer = self._leaving.pop(0)
            transfer.wait()
            if self._has_changed(region):
                # Gradients may accumulate before their hook runs, or without one.
                region.save().wait()
            region.drop()

    def _has_changed(self, region: Region) -> bool:
        """Return whether a gradient in `region` was written into since it arrived."""
        return any(
            _version(gone.gradient) != gone.version
            for gone in self._gone.values()
            if self._slots[gone.parameter][0] is region
        )

    def clipping(self) -> TorchFunctionMode:
        """Return a context in which norms are those computed at offload, and scaling and clamping are deferred."""
        return _Clipping(self._gone)


class _Clipping(TorchFunctionMode):
    def __init__(self, gone: Mapping[int, _Gone]) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = compat.foreach_kind(func)
        euclidean = not kwargs and all(isinstance(one, int | float) and one == 2 for one in args[1:])
        if kind == "norms" and euclidean:
            return [self._norm(tensor) for tensor in args[0]]
        if kind == "in place" and not any(isinstance(one, list | tuple) for one in args[1:]):
            here = [tensor for tensor in args[0] if not self._later(func, tensor, args[1:], kwargs, listed=True)]
            return func(here, *args[1:], **kwargs) if here else None
        if func in _NORMS and euclidean and id(args[0]) in self._gone:
            return self._norm(args[0])
        if func in _CHANGES and self._later(func, args[0], args[1:], kwargs):
            return args[0]
        seen = [self._gone[id(leaf)] for leaf in compat.leaves((args, kwargs)) if id(leaf) in self._gone]
        if seen and getattr(func, "__name__", "") == "__get__":
            # The changes do not affect the shape and similar attributes.
            result = func(*args, **kwargs)
            seen = seen if isinstance(result, Tensor) else []
        for gone in seen:
            _make_changes(gone)
        return func(*args, **kwargs)

    def _norm(self, tensor: Tensor) -> Tensor:
        """Return the norm of a gradient: the one computed at offload if it is valid, as a new tensor.

        Callers may turn the new tensor into a plain one.
        """
        gone = self._gone.get(id(tensor))
        if gone is not None:
            _make_changes(gone)
        if gone is None or gone.norm is None or _version(tensor) != gone.version:
            found: Tensor = torch.linalg.vector_norm(tensor)
            return found
        return _copied(gone.norm)

    def _later(
        self, func: Any, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any], *, listed: bool = False
    ) -> bool:
        """Defer the change if `tensor` is an offloaded gradient, and return whether it was deferred."""
        gone = self._gone.get(id(tensor))
        if gone is None:
            return False
        plain = [one.full_tensor() if isinstance(one, DTensor) else one for one in args]
        gone.changes.append(lambda values: func([values] if listed else values, *plain, **kwargs))
        return True


def _version(gradient: Tensor) -> int:
    """Return a number that grows with each write into `gradient` or its local shard, which FSDP2 accumulates into."""
    own = compat.version(compat.local_tensor(gradient)) if isinstance(gradient, DTensor) else 0
    return compat.version(gradient) + own


def _make_changes(gone: _Gone) -> None:
    """Apply the deferred changes to the gradient in place."""
    if not gone.changes:
        return
    changes, gone.changes, gone.norm = gone.changes, [], None
    values = local_of(gone.gradient)
    with torch.no_grad():
        for change in changes:
            change(values)
    let_rest(values)


def _copied(norm: Tensor) -> Tensor:
    """Return a copy of `norm`; for a DTensor, a copy of its local value with the same placements.

    `DTensor.clone` would reduce the partial norms. That is a collective, and ranks whose shard of the gradient is empty
    have computed no norm and would not take part.
    """
    if not isinstance(norm, DTensor):
        return norm.clone()
    found: Tensor = compat.divided_as(norm, norm.to_local().clone())
    return found


_NORMS = (torch.linalg.vector_norm,)
_CHANGES = (Tensor.mul_, Tensor.clamp_)
