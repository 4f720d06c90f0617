"""Activation offload: the tensors that a block saves for backward are kept in another tier until its backward.

Saved-tensor hooks see the tensors that a block's forward saves. When the next block begins, offload of their storages
begins; before the block after it begins, it is complete. So the saved tensors of two blocks at most are on the device.
Those of the last block of a forward, whose backward follows at once, stay there. When backward reaches a block, the
saved tensors of that block and of the blocks to prefetch are fetched. Tensors that are still or again on the device are
used as they are.

Tensors that live on the device anyway stay there: parameters, buffers, views of them, and weights that FSDP2 gathers.
So do small tensors, and tensors without a plain dense storage (sparse tensors and subclasses).

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
from lightning_largescale.dtensors import local_of
from lightning_largescale.errors import PlanError
from lightning_largescale.forward import Forward
from lightning_largescale.offload.saved import DiskTier, HostTier, Saved, Sent, Tier
from lightning_largescale.offload.store import Store
from lightning_largescale.plan import Plan
from lightning_largescale.workload.blocks import find_blocks

# A smaller transfer takes as long as one of this size.
SMALL_BYTES = 64 * 2**10


def offload_activations(module: nn.Module, plan: Plan, store: Store | None, device: torch.device) -> Callable[[], None]:
    """Offload the tensors that blocks of `module` save for backward: the blocks that `plan` names, or all.

    Results equal those of the plain run bit for bit. The module is changed in place; its names and state_dict keys
    stay. Call this after activation checkpointing and compilation were applied, so that the tensors these keep are
    offloaded (for a checkpoint, the block's positional inputs), and before sharding. On a CPU, "cpu" is the device's
    own tier, and nothing is done.

    Backward raises if a saved tensor was modified in place, as it does without offload; a write through `.data`, which
    torch does not count, is not detected. If saved-tensor hooks are in force already, as inside a checkpoint of the
    user's own, a block does not add its own.

    Args:
        module: The module, with repeated blocks.
        plan: The plan; `offload_activations`, `offloaded_blocks` and `prefetched_blocks` are read.
        store: The store for the tier "nvme".
        device: The device that the module computes on.

    Returns:
        A function that restores the blocks' forward. Tensors that were saved before it is called are still fetched.

    Raises:
        PlanError: The plan asks for activation offload, and `module` has no repeated blocks or no block of a name in
            the plan. From a block's forward: the disk is full.
        StoreError: From a block's forward or backward: the disk failed.
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
        tier = DiskTier(store, device, plan.prefetched_blocks)
    elif device.type == "cuda":
        tier = HostTier(device)
    else:
        return lambda: None
    offload = _Offload(tier, device, plan.prefetched_blocks, _outside(module, blocks.values()))
    for name in plan.offloaded_blocks or blocks:
        _Offloaded(blocks[name], name, offload).replace()
    return lambda: _Offloaded.restore(module)


class _Offloaded(Forward):
    """A block's forward whose saved tensors are offloaded."""

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
    """The offload state that the blocks of a module share.

    Args:
        tier: The tier that storages are offloaded to.
        device: The device that they are on.
        ahead: How many calls of blocks are prefetched before the one whose backward runs.
        outside: Tensors outside of the blocks, as the dictionaries that hold them and their keys. Blocks may receive
            them as inputs; they live on the device anyway.
    """

    def __init__(
        self, tier: Tier, device: torch.device, ahead: int, outside: list[tuple[MutableMapping[str, Any], str]]
    ) -> None:
        self.tier, self.device_type = tier, device.type
        self._ahead, self._outside = ahead, outside
        # The offloaded form of each storage, as long as both live.
        self.known: weakref.WeakValueDictionary[StorageWeakRef, Saved] = weakref.WeakValueDictionary()
        # The calls whose graphs live, in their order.
        self._calls: list[weakref.ref[_BlockForward]] = []
        self._leaving: Sent = []
        # The call whose backward runs, and the calls whose storages were fetched.
        self._reached: weakref.ref[_BlockForward] | None = None
        self._open: weakref.WeakSet[_BlockForward] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Offload:
        return self

    def begin(self, name: str, block: nn.Module) -> _BlockForward:
        """Begin a call of `block`, and begin to offload the storages that the previous call saved."""
        with self._lock:
            self._calls = [known for known in self._calls if known() is not None]
            last = self._calls[-1]() if self._calls else None
            # Cleared first, so that a failure here is not raised again in another step.
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
        """Fetch the storages that `call`, whose backward runs, and the `ahead` calls before it saved."""
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
                    # The graph may be kept (`retain_graph`), and must not hold all of its storages in memory.
                    for saved in one.storages():
                        saved.forget()
            for one in reversed(near):
                self._open.add(one)
                for saved in reversed(one.storages()):
                    self.tier.fetch(saved)


class _BlockForward:
    """One run of a block's forward.

    Args:
        name: The block's name.
        offload: The offload state that the module's blocks share.
        stays: Addresses of storages that live on the device anyway.
    """

    def __init__(self, name: str, offload: _Offload, stays: set[int]) -> None:
        self.offload = offload
        self._name, self._stays = name, stays
        self._storages: dict[int, weakref.ref[Saved]] = {}

    def storages(self) -> list[Saved]:
        """Return the storages that this call saved and that are still needed, in the order in which it saved them."""
        return [saved for known in list(self._storages.values()) if (saved := known()) is not None]

    def pack(self, tensor: Tensor) -> _ResidentTensor | _View:
        """Return the object that autograd keeps in place of `tensor`."""
        if not self._leaves(tensor):
            return _ResidentTensor(tensor)
        storage = tensor.untyped_storage()
        key: StorageWeakRef = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        known = self.offload.known
        saved, version = known.get(key), compat.version(tensor)
        # After a write since it was saved, the storage has other content.
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
        return (
            not isinstance(compat.view_base(tensor), nn.Parameter)
            and tensor.untyped_storage().data_ptr() not in self._stays
        )


class _ResidentTensor:
    """A saved tensor that stays on the device."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, since its graph may hold this object.
        self._tensor, self._version = tensor.detach(), compat.version(tensor)

    def unpack(self) -> Tensor:
        _check_version(self._tensor, self._tensor, self._version)
        return self._tensor


class _View:
    """A saved tensor whose storage is offloaded."""

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
    """Raise autograd's error if `tensor` was modified in place since it was saved.

    Autograd does not check tensors that hooks have packed.
    """
    version = compat.version(versions)
    if version != expected:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation:"
            f" [{tensor.type()} {list(tensor.shape)}] is at version {version}; expected version {expected} instead."
        )


def _outside(module: nn.Module, blocks: Iterable[nn.Module]) -> list[tuple[MutableMapping[str, Any], str]]:
    """Return the parameters and buffers of `module` outside of its blocks, as their dictionaries and keys."""
    inside = {part for block in blocks for part in block.modules()}
    return [
        (held, key)
        for part in module.modules()
        if part not in inside
        for held in compat.own_tensors(part)
        for key in held
    ]


def _places(tensor: Any) -> Iterator[int]:
    """Yield the address of the storage of `tensor`, for a DTensor that of its local tensor.

    Yields:
        One address for each dense tensor that holds its data; none if there is no such tensor.
    """
    if tensor is None:
        return
    with torch.no_grad():
        local = local_of(tensor)
    for part in compat.dense_parts(local):
        yield part.untyped_storage().data_ptr()
