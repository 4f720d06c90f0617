"""Gradients as they come: taken to another tier, or used for an update at once.

Gradients of a block are complete in backward before the last of those of the block before it. So when one of another
block arrives, what has arrived before can leave, or be used.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.1.1; Lv et al. 2023, "Full Parameter Fine-tuning for Large
    Language Models with Limited Resources" (LOMO), section 3.
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
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import let_rest
from lightning_largescale.offload.mapped_memory import Region
from lightning_largescale.offload.offloaded_parameters import GradientPlaces
from lightning_largescale.offload.paged_optimizer import PagedOptimizer
from lightning_largescale.offload.paged_state import as_divided
from lightning_largescale.offload.pages import local_of
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.tiers import aligned

_GRADIENT: Any = Tensor.grad


class Arrivals:
    """Tells when the gradients of a block have arrived, until `stop`.

    Those that FSDP2 copies from a CUDA device to DRAM are told of when ones of another block have come after them: the
    copies run beside what computes meanwhile.

    Args:
        label_of: the block of each parameter to watch.
        arrived: is given each gradient's parameter as it comes.
        complete: is given a block when one of another has come after it.
        copied: modules that `fully_shard` was applied to and whose shards are in DRAM beside a CUDA device.
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
        # On which gradients came that are on the device, and their memory is given back.
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
        """No more are to come in this backward."""
        label, self._label = self._label, None
        copying, self._copying = self._copying, []
        if label is None:
            return
        for parameters, wait in copying:
            wait()
            for parameter in parameters:
                # What autograd.grad was asked for has been taken since.
                if _GRADIENT.__get__(parameter) is not None:
                    self._arrived(parameter)
        self._complete(label)

    def forget(self) -> None:
        """The backward is over before its end."""
        self._label = None
        self._copying.clear()

    def stop(self) -> None:
        """Watch no more."""
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
            # Those of the block before are on the device: their memory is that of the stream that reduced them.
            with torch.cuda.stream(stream):
                self._begin(self._label_of[watched[0]])
            torch.cuda.current_stream().wait_stream(stream)
        self._copying.append((watched, wait))

    def _begin(self, label: str) -> None:
        if self._label not in (None, label):
            self.end()
        self._label = label


class Release:
    """Updates the parameters of each block as soon as its gradients are complete, and drops these, until `stop`.

    Args:
        optimizer: of all of them.
        label_of: the block of each parameter; those of no block are left to the step that follows.
        prepare: is given parameters, whose gradients are complete, before they are updated.
        copied: as of `Arrivals`.
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
        # What was updated after what, in the step before.
        self._following: dict[str, str] = {}
        self._members: dict[str, list[Tensor]] = {}
        self._last: str | None = None
        self._done: set[Tensor] = set()
        self._arrivals = Arrivals(label_of, self._arrived, self._update, copied)

    def end_backward(self) -> None:
        """Update what is left."""
        self._arrivals.end()

    def end_step(self) -> None:
        """The step is done: each may be updated again."""
        self._done.clear()
        self._last = None

    def forget(self) -> None:
        """Leave a step that raised."""
        self._arrivals.forget()
        self._waiting.clear()
        self._done.clear()
        self._last = None

    def stop(self) -> None:
        """Update no more in backward."""
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
            # Of others it is for those who compute it to say.
            if parameter in self._optimizer.paged.entries:
                parameter.grad = None


@dataclass(eq=False)
class _Gone:
    """A gradient that has left.

    Attributes:
        parameter: whose it is, as long as nothing else is in its place.
        gradient: as its parameter has it: what maps the file.
        norm: of it; None where it was not taken, or is no longer its.
        version: of `gradient`, of which `norm` is.
        changes: that are made when it is read.
    """

    parameter: Tensor
    gradient: Tensor
    norm: Tensor | None
    version: int
    changes: list[Callable[[Tensor], object]] = field(default_factory=list)


class SpilledGradients(GradientPlaces):
    """Gradients in a store, from when they are complete until the optimizer reads them, until `stop`.

    `grad` of a parameter is then a tensor that maps the store's file. What clips gradients need not read them: the norm
    of each is taken as it leaves, and factors and bounds are applied when the optimizer reads it, or at once where
    something else does.

    Args:
        blocks: the parameters of each, all with the same rank's part as their gradients.
        store: where they go.
        norms: whether the norms are to be taken.
        copied: as of `Arrivals`.

    Raises:
        PlanError: the disk has not as many bytes.
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
        # By the identity of the gradient.
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
        """Until all that came has left.

        Raises:
            StoreError: it could not.
        """
        self._arrivals.end()
        self._drain(0)

    def forget(self) -> None:
        """Leave a step that raised."""
        self._arrivals.forget()
        self._leaving.clear()
        for region in self._regions.values():
            # That it could not be written was told of when it was waited for, and nobody wants it any more.
            with contextlib.suppress(StoreError):
                region.drop()
            region.drop()
        self._gone.clear()

    def stop(self) -> None:
        """Let gradients stay in memory."""
        self._arrivals.stop()

    def region_of(self, gradient: Tensor) -> Region | None:
        """Of the store, where it is kept; None where it is in memory."""
        if not gradient.numel():
            return None
        return next((region for region in self._regions.values() if region.holds(gradient)), None)

    def changed(self, gradient: Tensor, values: Tensor) -> Tensor:
        """`values` of it with the changes that were left for when it is read."""
        gone = self._gone.get(id(gradient))
        for change in () if gone is None else gone.changes:
            change(values)
        return values

    def settle(self) -> None:
        """Make the changes that were left for later to all that is there, for those who read or change it now."""
        for gone in self._gone.values():
            if gone.parameter.grad is gone.gradient:
                _make_changes(gone)

    def _arrived(self, parameter: Tensor) -> None:
        # Of the shard, whatever those who watch it would have its gradient be.
        gradient = _GRADIENT.__get__(parameter)
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
            _GRADIENT.__set__(parameter, kept)
        else:
            kept = gradient
        for key in [key for key, gone in self._gone.items() if gone.parameter is parameter]:
            del self._gone[key]
        norm = torch.linalg.vector_norm(kept) if self._norms else None
        self._gone[id(kept)] = _Gone(parameter, kept, norm, _version(kept))
        if not region.in_dram:
            let_rest(memory)

    def _kept(self, region: Region) -> bool:
        """Whether gradients of earlier backwards lie there."""
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
                # More of a gradient is there before its hook tells of it, or without one.
                region.save().wait()
            region.drop()

    def _has_changed(self, region: Region) -> bool:
        """Whether a gradient that lies there was written into since it arrived."""
        return any(
            _version(gone.gradient) != gone.version
            for gone in self._gone.values()
            if self._slots[gone.parameter][0] is region
        )

    def clipping(self) -> TorchFunctionMode:
        """Within, norms of the gradients are those that were taken; what scales or bounds them is left for later."""
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
            # Of its shape, and the like, changes make no other.
            result = func(*args, **kwargs)
            seen = seen if isinstance(result, Tensor) else []
        for gone in seen:
            _make_changes(gone)
        return func(*args, **kwargs)

    def _norm(self, tensor: Tensor) -> Tensor:
        """That was taken, if it was; as a new tensor, which others make a plain one of."""
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
        """Whether it has left, so that the change is made when it is read."""
        gone = self._gone.get(id(tensor))
        if gone is None:
            return False
        plain = [one.full_tensor() if isinstance(one, DTensor) else one for one in args]
        gone.changes.append(lambda values: func([values] if listed else values, *plain, **kwargs))
        return True


def _version(gradient: Tensor) -> int:
    """A number that grows with writes into it or into this rank's part, as FSDP2 adds to it."""
    own = compat.version(compat.local_tensor(gradient)) if isinstance(gradient, DTensor) else 0
    return compat.version(gradient) + own


def _make_changes(gone: _Gone) -> None:
    """Make those that were left for later."""
    if not gone.changes:
        return
    changes, gone.changes, gone.norm = gone.changes, [], None
    values = local_of(gone.gradient)
    with torch.no_grad():
        for change in changes:
            change(values)
    let_rest(values)


def _copied(norm: Tensor) -> Tensor:
    """A tensor of its own; of a norm of ranks' parts, each still with its part: a clone would put them together, which
    is a collective, and ranks that have nothing of a gradient have taken no norm of it.
    """
    if not isinstance(norm, DTensor):
        return norm.clone()
    found: Tensor = compat.divided_as(norm, norm.to_local().clone())
    return found


_NORMS = (torch.linalg.vector_norm,)
_CHANGES = (Tensor.mul_, Tensor.clamp_)
