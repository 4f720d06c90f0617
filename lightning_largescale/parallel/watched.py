"""Watch a parameter of a sharded module: writes into its leaf are copied to its shard.

Each rank keeps only its own slice of the values that it writes, so all ranks have to write the same values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.errors import PlanError
from lightning_largescale.parallel.average import Average
from lightning_largescale.parallel.order import divided, full, order_of
from lightning_largescale.parallel.parameter_access import (
    DATA,
    GRADIENT,
    TRAINED,
    WATCHED,
    GatheredParameter,
    GatheredShard,
    ShardParameter,
    ShardValues,
    gathered_class,
)


class ShardStore(Protocol):
    """A store that keeps shards in another tier, at fixed addresses."""

    def keeps_shard(self, shard: Tensor) -> bool:
        """Return whether the store keeps `shard`."""

    def writing(self, shard: Tensor) -> AbstractContextManager[None]:
        """Return a context in which writes into the memory of `shard` persist."""


class Watched:
    """A parameter of a sharded module, watched from `adopt` on.

    Args:
        one: the parameter.
        group: the module that owns its FSDP group.
        elsewhere: returns the store that keeps shards in another tier; None if there is none.
        others: all watched parameters of the module.
        average: averages gradients over the ranks.
        set_gradient: assigns a gradient that is not a shard.
        computes: returns whether a step runs, or its backward is still to come.
        in_graph: groups that a backward is still to reach.
        stale: set of groups whose leaves and shards differ; `group` is added to it.

    Attributes:
        one: the parameter.
        average: averages gradients over the ranks.
        reducing: whether FSDP2 is reading and dropping the leaf's gradient.
    """

    def __init__(
        self,
        one: compat.GroupedParameter,
        group: nn.Module,
        *,
        elsewhere: Callable[[], ShardStore | None],
        others: Sequence[Watched],
        average: Average,
        set_gradient: Callable[[Watched, Tensor], None],
        computes: Callable[[], bool],
        in_graph: Collection[nn.Module],
        stale: set[nn.Module],
    ) -> None:
        self.one, self.reducing = one, False
        self._computes, self._in_graph, self._stale = computes, in_graph, stale
        self._group, self._elsewhere, self._set_gradient = group, elsewhere, set_gradient
        self._others, self.average = others, average
        # Shares the leaf's memory but not its version counter, like the result of `data` in plain torch.
        self._values: Tensor | None = None
        # The result of `versions` at the last `look`.
        self._seen: tuple[int, ...] = ()
        # `_exposed`: code got access to the leaf's memory that bypasses the version counters.
        self._exposed = self._is_foreign = self._is_stale = False
        self._handed: Callable[[], object] = lambda: None

    def adopt(self, *, leaf: bool, shard: bool) -> None:
        """Watch the current leaf and shard objects, as far as `leaf` and `shard` ask for it."""
        divided = self.one.shard
        if shard and type(divided) is DTensor:
            divided.__class__ = ShardParameter
            vars(divided)[WATCHED] = weakref.ref(self)
        gathered = self.one.leaf
        if gathered is None or not leaf:
            return
        if isinstance(gathered, GatheredParameter | GatheredShard):
            return
        kind = type(gathered)
        self._is_foreign = not (kind is DTensor or issubclass(kind, nn.Parameter))
        if not self._is_foreign:
            gathered.__class__ = GatheredShard if kind is DTensor else gathered_class(kind)  # type: ignore[arg-type]
            vars(gathered)[WATCHED] = weakref.ref(self)

    def look(self) -> None:
        """Record that leaf and shard are equal now."""
        # A leaf of a foreign class does not report accesses to its data.
        self._seen, self._exposed, self._is_stale = self.versions(), self._is_foreign, False

    def settle(self) -> None:
        """Copy values written into a gathered leaf since `look` to the shard.

        Raises:
            PlanError: the leaf has a lower precision than the shard.
        """
        if self.one.is_gathered and not self._is_stale:
            if self.is_written():
                self.keep()
            # The shard may change from here on, so a later comparison needs a new record.
            self.look()

    def is_written(self) -> bool:
        """Return whether the gathered leaf was written into since `look`."""
        if self._is_moved() or self.versions() != self._seen:
            return True
        return self._exposed and not self._equals_shard()

    def keep(self) -> None:
        """Copy this rank's slice of the gathered leaf to the shard.

        Raises:
            PlanError: the leaf has a lower precision than the shard.
        """
        one = self.one
        if one.is_cast:
            self.look()
            raise PlanError(
                f"{one.name!r} was written into while it was gathered in {one.leaf.dtype}, of which its"
                f" {one.shard.dtype} shards cannot be made; write into it in on_train_batch_start or"
                " on_train_batch_end, where its shards are, or use precision='32-true'."
            )
        with torch.no_grad():
            if self._is_moved():
                one.set_values(one.leaf)
                DATA.__set__(one.leaf, one.values)
                self._values = None
            with self._writing():
                one.memory.copy_(one.own_memory)
        self.look()

    def _writing(self) -> AbstractContextManager[None]:
        found = self._elsewhere()
        return torch.no_grad() if found is None else found.writing(self.one.shard)

    @contextmanager
    def writing_shard(self, moved: Tensor | None = None) -> Iterator[None]:
        """Context for writes into the shard, gathered or not.

        If the parameter is gathered, the leaf gets the new values after the context in a step, else in the next step.

        Args:
            moved: the tensor assigned to `data`, if any; tensors that autograd saved of the leaf keep their old memory.
        """
        self.settle()
        leaf, before = self.one.leaf, compat.version(self.one.shard)
        with self._writing():
            yield
        # Writes through `data` are not counted. With the raised version a backward that needs the old values raises.
        counted = compat.version(self.one.shard) != before
        if counted and leaf is not None and self._computes():
            both = (leaf, compat.local_tensor(leaf)) if isinstance(leaf, DTensor) else (leaf,)
            increment_version(both)
        if not self.one.is_gathered:
            return
        self._is_stale = True
        if not self._computes():
            self._stale.add(self._group)
        elif moved is None or self.one.is_cast or isinstance(self.one.leaf, DTensor):
            self.one.gather_again()
        else:
            whole = full(moved, order_of(self.one.shard))
            DATA.__set__(self.one.leaf, whole.to(self.one.leaf.device, self.one.leaf.dtype, copy=True))
            self._values, self._is_stale = None, False

    def versions(self) -> tuple[int, ...]:
        """Return the version counters of the tensors that share the leaf's memory; a write changes them."""
        leaf = self.one.leaf
        local = compat.version(compat.local_tensor(leaf)) if isinstance(leaf, DTensor) else 0
        # 0 for values that were not handed out yet, as for values without writes.
        return compat.version(leaf), local, 0 if self._values is None else compat.version(self._values)

    def _is_moved(self) -> bool:
        """Return whether a tensor was assigned to `data` of the leaf."""
        leaf = self.one.leaf
        local = compat.local_tensor(leaf) if isinstance(leaf, DTensor) else leaf
        moved: bool = local.data_ptr() != self.one.gathered_memory.data_ptr()
        return moved

    def _equals_shard(self) -> bool:
        own, memory = self.one.own_memory, self.one.memory
        memory = memory.to(own.device, own.dtype)
        # Compared as bytes, so that NaNs are equal.
        return torch.equal(own.view(torch.uint8), memory.view(torch.uint8)) if own.numel() else True

    # Access to the leaf

    def leaf_data(self) -> Tensor:
        """Return the result of the leaf's `data`; its version counter shows writes."""
        self._exposed = True
        if self._values is None:
            self._values = DATA.__get__(self.one.leaf)
        return self._values.detach()

    def expose(self) -> None:
        """Record that code gets access to the leaf's memory that bypasses the version counters."""
        self._exposed = True

    def assign_leaf(self, value: Tensor) -> None:
        """Assign to `data` of the leaf.

        Raises:
            PlanError: `value` has another shape or dtype or shares another parameter's memory, or the leaf has a lower
                precision than the shard.
        """
        one = self.one
        if not one.is_gathered:
            self.assign_shard(value)
            return
        self._check(value)
        if one.is_cast:
            raise PlanError(
                f"data of {one.name!r} is assigned while it is gathered in {one.leaf.dtype}, of which its"
                f" {one.shard.dtype} shards cannot be made; assign it in on_train_batch_start or on_train_batch_end,"
                " where its shards are, or use precision='32-true'."
            )
        if isinstance(one.leaf, DTensor):
            self._exposed = True
            local = self._local_of(value, one.leaf)
            with torch.no_grad():
                compat.local_tensor(one.leaf).copy_(local)
            return
        value = full(value, order_of(one.shard))
        self._check_own(value)
        DATA.__set__(one.leaf, value)
        self._values = None

    # Access to the shard

    def hand_out(self, values: Tensor, *, data: bool) -> Tensor:
        """Return `values` as a tensor whose writes are watched.

        Args:
            values: a tensor on the shard's memory.
            data: whether it is the result of `data`, which code may assign to `data` again.
        """
        values.__class__ = ShardValues
        vars(values)[WATCHED] = weakref.ref(self)
        if data:
            self._handed = weakref.ref(values)
        return values

    def assign_shard(self, value: Tensor) -> None:
        """Assign to `data` of the shard, which takes over the memory of `value` where possible.

        Raises:
            PlanError: `value` has another shape or dtype, or would be copied and shares another parameter's memory; a
                backward that needs the old values is still to come; or the memory is fixed in another tier while an
                earlier result of `data` is still in use.
        """
        one, shard = self.one, self.one.shard
        self._check(value)
        # Autograd's saved tensors of a leaf that was moved already have the memory that `settle` would copy first.
        again = one.is_gathered and self._is_moved()
        if self._computes() and (again or (self._group in self._in_graph and not one.is_gathered)):
            raise PlanError(
                f"data of {one.name!r} is assigned between its forward and its backward, for which it is gathered anew"
                " with other values than it had; write into it in place (`parameter.data.copy_(...)`), or assign it"
                " before its forward or in on_train_batch_start or on_train_batch_end."
            )
        local, memory = self._local_of(value, shard), one.memory
        elsewhere = self._elsewhere()
        stays = one.is_pinned or (elsewhere is not None and elsewhere.keeps_shard(shard))
        fits = local.is_contiguous() and local.numel() == memory.numel() and local.device == memory.device
        if stays or not fits:
            self._check_own(local)
        if stays:
            if self._handed() is not None and self._handed() is not value:
                raise PlanError(
                    f"data of {one.name!r} is assigned while what it gave before is kept, and offload_parameters keeps"
                    " both at one place; keep a clone of it (`parameter.data.clone()`)."
                )
            with torch.no_grad(), self.writing_shard(moved=value):
                memory[: local.numel()].copy_(local.reshape(-1))
            return
        if not fits:
            padded = torch.zeros_like(memory)
            padded[: local.numel()].copy_(local.reshape(-1))
            local = padded
        with self.writing_shard(moved=value):
            compat.place_shard(self._group, shard, local.view(-1))

    def _local_of(self, value: Tensor, like: DTensor) -> Tensor:
        if not isinstance(value, DTensor):
            value = divided(value.detach().to(like.device), like, order_of(self.one.shard))
        elif value.placements != like.placements:
            value = value.redistribute(like.device_mesh, like.placements)
        local: Tensor = compat.local_tensor(value.detach())
        return local

    def _check_own(self, local: Tensor) -> None:
        """Make sure that `local` is not another parameter's memory, since it is copied and thus would not be shared."""
        if compat.storage_users(local.untyped_storage()) == 1:
            return
        storage = local.untyped_storage().data_ptr()
        for other in self._others:
            memories = [other.one.memory, *([other.one.gathered_memory] if other.one.is_gathered else [])]
            if other is not self and any(one.untyped_storage().data_ptr() == storage for one in memories):
                raise PlanError(
                    f"data of {self.one.name!r} is assigned that of {other.one.name!r}, and parameters that are sharded"
                    " have no memory in common; assign a clone of it (`other.data.clone()`)."
                )

    def _check(self, value: object) -> None:
        shard = self.one.shard
        if isinstance(value, Tensor) and value.shape == shard.shape and value.dtype == shard.dtype:
            return
        found = f"{tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise PlanError(
            f"data of {self.one.name!r} is assigned {found}, and what is sharded keeps its shape {tuple(shard.shape)}"
            f" and {shard.dtype}; assign a tensor of these."
        )

    # Gradients

    def gradient(self) -> Tensor | None:
        """Return the parameter's unreduced gradient if there is one, else the shard's gradient."""
        unreduced: Tensor | None = self.one.unreduced_gradient
        return GRADIENT.__get__(self.one.shard) if unreduced is None else unreduced

    def set_gradient(self, value: Tensor | None) -> None:
        """Assign the gradient of the parameter."""
        shard = self.one.shard
        if self.reducing:
            return
        if value is not None and not (isinstance(value, DTensor) and value.placements == shard.placements):
            self._set_gradient(self, value)
            return
        self.one.unreduced_gradient = None
        # Shards may be offloaded to DRAM.
        GRADIENT.__set__(shard, None if value is None else value.to(shard.device))

    def hold_gradient(self, value: Tensor) -> None:
        """Assign an unreduced gradient, to be reduced later."""
        self.set_gradient(None)
        self.one.unreduced_gradient = value

    def train(self, trained: bool) -> None:
        """Freeze or unfreeze leaf and shard."""
        for parameter in (self.one.leaf, self.one.shard):
            if parameter is not None:
                TRAINED.__set__(parameter, trained)
