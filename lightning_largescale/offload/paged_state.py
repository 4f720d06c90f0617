"""The location of an optimizer's state between steps, and its transfer into and out of page buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.usage import let_rest
from lightning_largescale.offload.buffers import Allowance, PageBuffers
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.mapped_memory import Memory, Region
from lightning_largescale.offload.pages import Bundle, Page, ParamEntry, ParamSlice, bundles_of
from lightning_largescale.offload.places import Places, elements
from lightning_largescale.offload.store import Store, Transfer
from lightning_largescale.optimizers.state_spec import SpecKey, StateSpec, spec_key, state_specs
from lightning_largescale.optimizers.trial import UntriedError, has_modes


def as_divided(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Wrap the state of a DTensor parameter's local shard as a DTensor with the same placements.

    A tensor of another shape, or of a parameter that is no DTensor, is returned as it is.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.to_local().shape:
        return tensor
    found: Tensor = compat.divided_as(parameter, tensor)
    return found


class _Move:
    """Replacement of the `to` method of a state tensor that is loaded: it moves the tensor to its place in the store.

    The arguments of `to` are ignored. Some optimizers deep-copy the state dict that they load; the copy then has a
    `_Move` of its own, with the copied values.

    Args:
        keep: Function that puts a tensor into its place.
        value: The tensor, without the replaced `to`.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor], value: Tensor) -> None:
        self._keep, self._value = keep, value

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._keep(self._value)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Move:
        # Through `memo`, the tensor's copy and this one share one copied storage.
        return _Move(self._keep, copy.deepcopy(self._value, memo))


class PagedState:
    """The pages of an optimizer, and the memory that holds the state of each.

    Args:
        optimizer: The optimizer whose state is paged.
        store: The store that holds the state; None to keep it in DRAM.
        buffers: The buffers that pages go through.
        resident: Budget of bytes of state that stay on the device; the bytes that stay are deducted from it.
        dram: With a store, budget of bytes of offloaded state that stay in DRAM; deducted likewise.
        places: Where the parameters and their gradients are.
        lanes: Copies to and from the device; None if the device's memory is DRAM.
        label_of: The label of a parameter. Parameters with different labels never share a page.

    Attributes:
        pages: The pages, in the order of the optimizer's parameters.
        entries: The entry of each parameter, including parameters that the optimizer no longer has.
        group_of: The group number of each parameter that the optimizer has, as of the last `lay_out`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        store: Store | None,
        buffers: PageBuffers,
        resident: Allowance,
        dram: Allowance,
        places: Places,
        lanes: Lanes | None,
        label_of: Callable[[Tensor], str],
    ) -> None:
        self._optimizer, self._store, self._buffers = optimizer, store, buffers
        self._resident, self._dram, self._places, self._lanes = resident, dram, places, lanes
        self._label_of = label_of
        self.pages: list[Page] = []
        self.group_of: dict[Tensor, int] = {}
        self.entries: dict[Tensor, ParamEntry] = {}
        self._regions: dict[Bundle, Region] = {}
        self._stay: set[Page] = set()
        self._views: dict[tuple[ParamEntry, str], Tensor] = {}
        self._bundle_of: dict[ParamEntry, Bundle] = {}
        # Specs found before hooks could switch the optimizer's modes, until it is probed again. If they differ then,
        # the bytes in `_taken` are given back.
        self._early_specs: dict[SpecKey, StateSpec] | None = {} if has_modes(optimizer) else None
        self._taken: list[tuple[Allowance, int]] = []

    @property
    def waits(self) -> bool:
        """Return whether the optimizer could not be probed yet, so that it is not known which state is paged."""
        return self._early_specs is not None and not self.entries

    def lay_out(self, *, early: bool = False) -> None:
        """Make pages for parameters that are new, move their existing state, and record each parameter's group.

        Args:
            early: Whether this is before the first step. An optimizer with modes is probed again at the first step, and
                all pages are laid out anew if the result differs. An optimizer that cannot be probed early is laid out
                at the first step.

        Raises:
            PlanError: The optimizer cannot be stepped on a subset of its parameters at a time, the disk has too little
                free space, or a parameter was moved to a group that keeps other state of it.
        """
        if not early and self._early_specs is not None:
            self._ask_again(self._early_specs)
        try:
            self._lay_out()
        except UntriedError:
            if self._early_specs is None:
                raise

    def _ask_again(self, early: Mapping[SpecKey, StateSpec]) -> None:
        """Probe the optimizer again, now that hooks have set its modes, and forget all pages if its state differs."""
        self._early_specs = None
        found = [(entry.parameter, entry.group) for entry in self.entries.values()]
        if not found or self._ask(found) == early:
            return
        for allowance, nbytes in self._taken:
            allowance.give_back(nbytes)
        self.group_of = {}
        for forgotten in (
            self.pages,
            self.entries,
            self._regions,
            self._stay,
            self._views,
            self._bundle_of,
            self._taken,
        ):
            forgotten.clear()

    def _lay_out(self) -> None:
        before, groups = self.group_of, self._optimizer.param_groups
        self.group_of = {one: number for number, group in enumerate(groups) for one in group["params"]}
        self._check_moved([(one, number) for one, number in self.group_of.items() if before.get(one) != number])
        fresh = [(one, number) for one, number in self.group_of.items() if one not in self.entries]
        if not fresh:
            return
        specs = self._ask(fresh)
        if self._early_specs is not None:
            self._early_specs.update(specs)
        entries = [
            ParamEntry(
                parameter, number, self._kept(parameter, specs[spec_key(parameter, number)]), self._label_of(parameter)
            )
            for parameter, number in fresh
        ]
        self.entries.update({entry.parameter: entry for entry in entries})
        for bundle in bundles_of(entries, self._places.bytes_per_element):
            self._place(bundle)
        for entry in entries:
            self._take_over(entry)

    def _ask(self, parameters: Sequence[tuple[Tensor, int]]) -> Mapping[SpecKey, StateSpec]:
        # Probe on the device that steps, since some optimizers do not support every device.
        return state_specs(self._optimizer, parameters, torch.device("cpu") if self._places.on_host else None)

    def _check_moved(self, found: Sequence[tuple[Tensor, int]]) -> None:
        moved = [(one, number) for one, number in found if one in self.entries and self.entries[one].group != number]
        specs = self._ask(moved) if moved else {}
        for parameter, number in moved:
            spec, own = specs[spec_key(parameter, number)], self.entries[parameter].spec
            # A parameter that is stepped on in full and has no paged state may have any state in the new group.
            other = spec.dtypes != own.dtypes and (own.elementwise or own.dtypes)
            if other or (own.elementwise and not spec.elementwise):
                raise PlanError(
                    f"a parameter of shape {tuple(parameter.shape)} was moved to group {number} of"
                    f" {type(self._optimizer).__name__}, by which other state is kept of it than was set aside; make"
                    " the groups in configure_optimizers, or leave out offload_optimizer and release_gradients."
                )

    def is_live(self, entry: ParamEntry) -> bool:
        """Return whether the optimizer still has the parameter of `entry`, and the parameter has a gradient.

        Raises:
            PlanError: The gradient is sparse.
        """
        gradient = entry.parameter.grad
        if gradient is None or entry.parameter not in self.group_of:
            return False
        if local_of(gradient).is_sparse:
            raise PlanError(
                f"the gradient of a parameter of shape {tuple(entry.parameter.shape)} is sparse, and optimizer state"
                " that is paged takes none; make its module without sparse=True, or leave out offload_optimizer."
            )
        return True

    def _kept(self, parameter: Tensor, spec: StateSpec) -> StateSpec:
        """Return `spec` for this parameter; one with no paged state if its state stays on the device.

        A parameter whose local shard is not contiguous is stepped on in full.
        """
        local = local_of(parameter.detach())
        if not local.is_contiguous():
            # A flat view in index order would be a copy, and the gradient's memory order may differ from its own.
            spec = replace(spec, elementwise=False)
        stays = self._on_device(parameter) and self._take(self._resident, local.numel() * spec.bytes_per_element)
        return StateSpec(elementwise=False) if stays else spec

    def _take(self, allowance: Allowance, nbytes: int) -> bool:
        """Take `nbytes` from `allowance` if that many are left, and return whether they were."""
        taken = allowance.take(nbytes)
        if taken:
            self._taken.append((allowance, nbytes))
        return taken

    def _on_device(self, parameter: Tensor) -> bool:
        """Return whether there are lanes and `parameter` is on their device."""
        return self._lanes is not None and local_of(parameter).device.type == self._lanes.device.type

    def _place(self, bundle: Bundle) -> None:
        """Reserve space for the state of `bundle`, and choose the pages of it that stay in memory."""
        moved = self._places.bytes_per_element(bundle.entries[0])
        pages = [*bundle.pages(moved)]
        name = f"the optimizer state of {len(bundle.entries)} parameters ({type(self._optimizer).__name__})"
        stays = self._store is None or not bundle.nbytes
        pinned = self._lanes is not None and self._lanes.pinned
        region = Region(None if stays else self._store, name, bundle.nbytes, pinned=pinned)
        in_dram = [self._dram] if self._lanes is not None else [self._resident, self._dram]
        for page in pages:
            if stays or any(self._take(one, page.state_bytes) for one in in_dram):
                self._stay.add(page)
                for key in bundle.dtypes:
                    region.keep(*bundle.stretch(key, page.start, page.stop))
            if self.moves(page):
                self._buffers.make_room(self._page_bytes(page))
        self.pages += pages
        self._regions[bundle] = region
        self._bundle_of.update(dict.fromkeys(bundle.entries, bundle))

    def _take_over(self, entry: ParamEntry) -> None:
        """Move the state of `entry` that the optimizer already has: made at construction, before the first step, or
        loaded.
        """
        state = self._optimizer.state.get(entry.parameter, {})
        stays = self._on_device(entry.parameter) and not entry.spec.dtypes
        for key, value in state.items():
            if not self.is_paged(entry, value):
                continue
            if key in entry.spec.dtypes:
                state[key] = self._put(entry, key, value)
            elif stays and key != "step" and local_of(value).device != entry.local.device:
                # It was loaded to DRAM, before it was known that the state stays on the device.
                state[key] = as_divided(entry.parameter, local_of(value).to(entry.local.device))

    def _put(self, entry: ParamEntry, key: str, value: Tensor) -> Tensor:
        """Copy `value` to the place of the state of `entry` under `key`, and return it there, a DTensor if sharded."""
        view = self.view(entry, key)
        if view.data_ptr() != local_of(value).data_ptr():
            view.copy_(local_of(value))
            let_rest(view)
        return as_divided(entry.parameter, view)

    def load(self, load: Callable[[dict[str, Any]], None], state_dict: Mapping[str, Any]) -> None:
        """Load `state_dict` with `load`, the optimizer's `load_state_dict`, and keep paged state in its place.

        The `load_state_dict` of torch moves state to the device of its parameter, which may have no room for it.
        """
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        indices = (index for group in state_dict["param_groups"] for index in group["params"])
        found = dict(zip(indices, parameters, strict=False))
        state = {index: self._staying(found.get(index), values) for index, values in state_dict["state"].items()}
        load({**state_dict, "state": state})
        for value in (one for parameter in parameters for one in self._optimizer.state.get(parameter, {}).values()):
            if isinstance(value, Tensor):
                # Some optimizers keep the tensor itself. It must not be pickled with the replaced `to`.
                vars(value).pop("to", None)
        for entry in filter(None, map(self.entries.get, found.values())):
            # Some optimizers do not load with `Tensor.to`.
            self._take_over(entry)

    def _staying(self, parameter: Tensor | None, values: Any) -> Any:
        """Return the state `values` of `parameter`, in which the `to` of each paged tensor is replaced by `_Move`."""
        if parameter is None or not isinstance(values, Mapping):
            return values
        entry, found = self.entries.get(parameter), dict(values)
        for key, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if entry is None:
                # The optimizer itself places the step count: fused kernels need it on the device.
                keep = Tensor.cpu if self.waits and key != "step" else None
            else:
                paged = key in entry.spec.dtypes and self.is_paged(entry, value)
                keep = partial(self._put, entry, key) if paged else None
            if keep is not None:
                found[key] = value.detach()
                vars(found[key])["to"] = _Move(keep, value.detach())
        return found

    def view(self, entry: ParamEntry, key: str) -> Tensor:
        """Return the state of `entry` under `key` as a view of the memory that holds it."""
        if (entry, key) not in self._views:
            bundle = self._bundle_of[entry]
            start = bundle.start_of(entry, key)
            shape, dtype = entry.local.shape, bundle.dtypes[key]
            self._views[entry, key] = entry.laid_out(self._regions[bundle].tensor(dtype, shape, start))
        return self._views[entry, key]

    def moves(self, page: Page) -> bool:
        """Return whether any part of `page` goes through a buffer: it is not in DRAM, or not stepped on in place."""
        return page not in self._stay or self._places.moved_bytes(page) > 0

    def crosses(self, page: Page) -> bool:
        """Return whether the state of `page` is copied to the device, where its parameters are."""
        entry = page.slices[0].entry
        return bool(page.bundle.dtypes) and self._on_device(entry.parameter) and self._places.keeps(entry)

    def copies(self, page: Page) -> bool:
        """Return whether the parameters of `page` are on the device and are copied to DRAM to be stepped on."""
        entry = page.slices[0].entry
        return self._on_device(entry.parameter) and not self._places.keeps(entry)

    def by_host(self, page: Page) -> bool:
        """Return whether the CPU steps on `page` although there is a device."""
        on_device = self._on_device(page.slices[0].entry.parameter)
        return self._lanes is not None and (self.copies(page) or not on_device)

    def _page_bytes(self, page: Page) -> int:
        return self._after_state(page) + self._places.moved_bytes(page)

    def _after_state(self, page: Page) -> int:
        """Return the byte of a buffer at which the state of a page ends and the rest of its data begins."""
        return 0 if page in self._stay else page.state_bytes

    def _segments(self, page: Page) -> Iterator[tuple[str, int, int, int]]:
        """Yield each state key of a page, the first byte and the one after the last in the region, and the first byte
        in a buffer.
        """
        at = 0
        for key in page.bundle.dtypes if page not in self._stay else ():
            start, stop = page.bundle.stretch(key, page.start, page.stop)
            yield key, start, stop, at
            at += stop - start

    def read(self, page: Page, buffer: Memory) -> Transfer:
        """Begin to read the data of `page` into `buffer`."""
        region = self._regions[page.bundle]
        transfers = []
        if any(self.is_here(span.entry, key) for span in page.slices for key in page.bundle.dtypes):
            transfers = [region.read_into(buffer, start, stop, at) for _, start, stop, at in self._segments(page)]
        return Transfer.of([*transfers, *self._places.read(page, buffer, self._after_state(page))])

    def write(self, page: Page, buffer: Memory) -> Transfer:
        """Begin to write the changed data of `page` back from `buffer`, laid out as `read` does."""
        region = self._regions[page.bundle]
        transfers = [region.write_from(buffer, start, stop, at) for _, start, stop, at in self._segments(page)]
        return Transfer.of([*transfers, *self._places.write(page, buffer, self._after_state(page))])

    def is_here(self, entry: ParamEntry, key: str) -> bool:
        """Return whether the optimizer's state of `entry` under `key` is the region's memory, not a foreign tensor."""
        value = self._optimizer.state.get(entry.parameter, {}).get(key)
        if not self.is_paged(entry, value):
            return False
        return self._regions[self._bundle_of[entry]].holds(local_of(value))

    def is_paged(self, entry: ParamEntry, value: Any) -> bool:
        """Return whether `value`, from the state of `entry`, is a tensor of the local shard's shape."""
        return isinstance(value, Tensor) and entry.local.numel() > 0 and local_of(value).shape == entry.local.shape

    def values(self, page: Page, buffer: Memory | None) -> Iterator[tuple[ParamSlice, Tensor, Tensor | None]]:
        """Yield each slice of a page with its elements and their gradient."""
        found = self._places.values(page, buffer, self._after_state(page))
        yield from ((span, *one) for span, one in zip(page.slices, found, strict=True))

    def slots(self, page: Page, span: ParamSlice, buffer: Memory | None) -> dict[str, Tensor]:
        """Return the state tensors of `span`, by key, while `page` is in `buffer`."""
        entry = span.entry
        if page in self._stay:
            return {key: elements(self.view(entry, key), span) for key in page.bundle.dtypes}
        assert buffer is not None
        shape = entry.local.shape if span.whole else (span.stop - span.start,)
        found = {
            key: buffer.tensor(dtype, shape, at + (span.at - page.start) * dtype.itemsize)
            for (key, _, _, at), dtype in zip(self._segments(page), page.bundle.dtypes.values(), strict=True)
        }
        return {key: entry.laid_out(slot) for key, slot in found.items()} if span.whole else found
