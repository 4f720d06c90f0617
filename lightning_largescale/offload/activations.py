"""Activation offload: what a block saves for its backward waits for it in another tier.

Hooks on saved tensors see what a block's forward saves. When the next block begins, the storages of what the last one
saved begin to leave; before one more begins, they have left. So two blocks' are on the device at most, and what the
last block of a forward saves, whose backward comes at once, stays there. A backward that reaches a block has what that
block, and the one before it, saved come back. What is here still, or again, is used as it is.

What lives on the device in any case stays: parameters, buffers, views of them, weights that FSDP2 gathers. So does what
is small, and what has no storage of its own kind (sparse tensors and subclasses).

Source: Pudipeddi et al. 2020, "Training Large Neural Networks with Constant Memory using a New Execution Algorithm"
    (L2L); Huang et al. 2020, "SwapAdvisor"; Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.1;
    torch.autograd.graph.saved_tensors_hooks and save_on_cpu.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.forward import Forward
from lightning_largescale.offload.pages import local_of
from lightning_largescale.offload.saved import DiskTier, HostTier, Saved, Sent, Tier
from lightning_largescale.offload.store import Store
from lightning_largescale.plan import Plan
from lightning_largescale.workload.blocks import find_blocks

# A request of fewer bytes takes as long as one of as many.
SMALL_BYTES = 64 * 2**10


def offload_activations(module: nn.Module, plan: Plan, store: Store | None, device: torch.device) -> Callable[[], None]:
    """Have what the blocks of `module` that `plan` names, or all, save for backward wait in another tier.

    Numbers are those of the plain run bit for bit. The module is changed in place, its names and state_dict keys are
    not. Call after recomputation and compilation were applied, so that what these keep leaves (of a checkpoint the
    block's positional inputs), and before sharding. On a CPU "cpu" is the device's own tier, and nothing is done.

    What is written into after it was saved makes backward raise, as it does otherwise; a write that torch does not
    count, through `.data`, is not seen. Where hooks on saved tensors are in force already, as inside a checkpoint of
    the user's own, a block leaves it to them.

    Args:
        module: with repeated blocks.
        plan: of which `offload_activations`, `offloaded_blocks` and `prefetched_blocks` are read.
        store: for the tier "nvme".
        device: that the module computes on.

    Returns:
        What gives the blocks back the forward they had; what was saved so far still comes back.

    Raises:
        PlanError: the plan asks for it and `module` has no repeated blocks, or none of a name that the plan has. From a
            block's forward: the disk has no room.
        StoreError: from a block's forward or backward: the disk failed.
    """
    if plan.offload_activations is None:
        return lambda: None
    blocks = find_blocks(module)
    if not blocks:
        raise PlanError(
            f"offload_activations={plan.offload_activations!r} needs repeated blocks and {type(module).__name__} has"
            " none; use None."
        )
    plan.check_blocks(blocks)
    tier: Tier
    if plan.offload_activations == "nvme":
        assert store is not None
        tier = DiskTier(store, device)
    elif device.type == "cuda":
        tier = HostTier(device)
    else:
        return lambda: None
    offload = _Offload(tier, device, plan.prefetched_blocks, _outside(module, blocks.values()))
    for name in plan.offloaded_blocks or blocks:
        _Offloaded(blocks[name], name, offload).replace()
    return lambda: _Offloaded.restore(module)


class _Offloaded(Forward):
    """A block's forward of which what it saves leaves."""

    def __init__(self, block: nn.Module, name: str, offload: _Offload) -> None:
        super().__init__(block)
        self._name, self._offload = name, offload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or compat.hooks_saved_tensors():
            return self.original(*args, **kwargs)
        call = self._offload.begin(self._name, self._module)
        with saved_tensors_hooks(call.pack, _unpack):
            return self.original(*args, **kwargs)


class _Offload:
    """What the blocks of a module have in common.

    Args:
        tier: where storages go.
        device: where they come from.
        ahead: how many calls of blocks are fetched before the one whose backward runs.
        outside: tensors by the dictionaries that hold them, which blocks may be given and which live on anyway.
    """

    def __init__(
        self, tier: Tier, device: torch.device, ahead: int, outside: list[tuple[MutableMapping[str, Any], str]]
    ) -> None:
        self.tier, self.device_type = tier, device.type
        self._ahead, self._outside = ahead, outside
        # By storage, as long as both live.
        self.known: weakref.WeakValueDictionary[StorageWeakRef, Saved] = weakref.WeakValueDictionary()
        # Calls in their order, whose graphs live.
        self._calls: list[weakref.ref[_BlockForward]] = []
        self._leaving: Sent = []
        # The call whose backward runs, and those of which something came back.
        self._reached: weakref.ref[_BlockForward] | None = None
        self._open: weakref.WeakSet[_BlockForward] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Offload:
        return self

    def begin(self, name: str, block: nn.Module) -> _BlockForward:
        """A call of `block` begins: what the call before saved leaves."""
        with self._lock:
            self._calls = [known for known in self._calls if known() is not None]
            last = self._calls[-1]() if self._calls else None
            # What fails here is not to be heard of again in another step.
            before, self._leaving = self._leaving, []
            leaving = [] if last is None else [one for one in last.storages() if not (one.sent or one.wanted)]
            sent = self.tier.send(leaving)
            self.tier.settle(before)
            self._leaving = sent
            tensors = chain(block.parameters(), block.buffers(), (held.get(key) for held, key in self._outside))
            call = _BlockForward(name, self, {place for tensor in tensors for place in _places(tensor)})
            self._calls.append(weakref.ref(call))
            return call

    def reach(self, call: _BlockForward) -> None:
        """The backward of `call` runs: what it and those before it saved comes back."""
        with self._lock:
            if self._reached is not None and self._reached() is call:
                return
            self._reached = weakref.ref(call)
            calls = [one for known in self._calls if (one := known()) is not None]
            place = next((place for place, one in enumerate(calls) if one is call), 0)
            near = calls[max(0, place - self._ahead) : place + 1]
            for one in list(self._open):
                if one not in near:
                    self._open.discard(one)
                    # Of a graph that is kept: it is not to have all of it in memory.
                    for saved in one.storages():
                        saved.forget()
            for one in reversed(near):
                self._open.add(one)
                for saved in reversed(one.storages()):
                    self.tier.fetch(saved)


class _BlockForward:
    """One run of a block's forward.

    Args:
        name: of the block.
        offload: that it takes part in.
        stays: addresses of storages that live on anyway.
    """

    def __init__(self, name: str, offload: _Offload, stays: set[int]) -> None:
        self.offload = offload
        self._name, self._stays = name, stays
        self._storages: dict[int, weakref.ref[Saved]] = {}

    def storages(self) -> list[Saved]:
        """That it saved and that are needed still, in the order in which it did."""
        return [saved for known in list(self._storages.values()) if (saved := known()) is not None]

    def pack(self, tensor: Tensor) -> _ResidentTensor | _View:
        """What autograd keeps in the place of `tensor`."""
        if not self._leaves(tensor):
            return _ResidentTensor(tensor)
        storage = tensor.untyped_storage()
        key: StorageWeakRef = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        known = self.offload.known
        saved, version = known.get(key), compat.version(tensor)
        # Written into since it was saved, it is another content.
        if saved is None or saved.version != version:
            saved = known[key] = Saved(self._name, storage, version)
        self._storages[id(saved)] = weakref.ref(saved)
        return _View(tensor, saved, self)

    def _leaves(self, tensor: Tensor) -> bool:
        plain = (
            type(tensor) is Tensor
            and not compat.is_transformed(tensor)
            and tensor.layout is torch.strided
            and tensor.device.type == self.offload.device_type
            and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
        )
        if not plain or tensor.untyped_storage().nbytes() < SMALL_BYTES:
            return False
        return not isinstance(tensor._base, nn.Parameter) and tensor.untyped_storage().data_ptr() not in self._stays


class _ResidentTensor:
    """A saved tensor that stays."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # Without its graph, which may hold this.
        self._tensor, self._version = tensor.detach(), compat.version(tensor)

    def unpack(self) -> Tensor:
        _check_version(self._tensor, self._tensor, self._version)
        return self._tensor


class _View:
    """A saved tensor whose storage leaves."""

    __slots__ = ("_call", "_dtype", "_place", "_saved", "_version", "_versions")

    def __init__(self, tensor: Tensor, saved: Saved, call: _BlockForward) -> None:
        self._saved, self._call = saved, call
        self._dtype, self._place = tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())
        self._version, self._versions = compat.version(tensor), compat.versions_of(tensor)

    def unpack(self) -> Tensor:
        offload = self._call.offload
        offload.reach(self._call)
        content = offload.tier.bytes_of(self._saved)
        found = torch.empty(0, dtype=self._dtype, device=content.device).set_(content.untyped_storage(), *self._place)
        _check_version(found, self._versions, self._version)
        return found


def _unpack(packed: _ResidentTensor | _View) -> Tensor:
    return packed.unpack()


def _check_version(tensor: Tensor, versions: Tensor, expected: int) -> None:
    """Raise what autograd does, which leaves it to hooks, where `tensor` was written into since it was saved."""
    version = compat.version(versions)
    if version != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation:"
            f" [{tensor.type()} {list(tensor.shape)}] is at version {version}; expected version {expected} instead."
        )


def _outside(module: nn.Module, blocks: Iterable[nn.Module]) -> list[tuple[MutableMapping[str, Any], str]]:
    """The dictionaries, and their keys, of parameters and buffers of `module` outside of its blocks."""
    inside = {part for block in blocks for part in block.modules()}
    return [
        (held, key)
        for part in module.modules()
        if part not in inside
        for held in compat.own_tensors(part)
        for key in held
    ]


def _places(tensor: Any) -> Iterator[int]:
    """The address of the storage of `tensor`, of one that is divided its local part's; nothing where there is none."""
    if tensor is None:
        return
    with torch.no_grad():
        local = local_of(tensor)
    for part in compat.dense_parts(local):
        yield part.untyped_storage().data_ptr()
