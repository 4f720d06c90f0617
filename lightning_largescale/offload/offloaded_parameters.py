"""Offload of the parameters and gradients of a sharded module's blocks to another tier.

In forward and in backward, a block's shard is fetched before the block's all-gather and dropped after it. The shards of
the next blocks are prefetched meanwhile, in the order of the previous step. Gradients are offloaded as they arrive.
With one rank the shard is the full parameter, and all else is the same. For a CUDA device, a shard is read into a
pinned buffer, and its own memory keeps mapping the file.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", sections 5.1 and 6.2; Pudipeddi et al. 2020, "Training Large Neural
    Networks with Constant Memory using a New Execution Algorithm" (L2L), section 3.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.hardware.usage import at_rest, let_rest
from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.mapped_memory import Memory, Region
from lightning_largescale.offload.pages import Page, ParamEntry
from lightning_largescale.offload.places import Places, elements
from lightning_largescale.offload.shards import ShardCopies
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.tiers import aligned
from lightning_largescale.workload.kinds import is_plain


@dataclass(eq=False)
class Spilled:
    """A block whose shard is offloaded.

    Attributes:
        name: The block's name.
        module: The block, which `fully_shard` was applied to.
        region: The memory that holds the shard.
        starts: The first byte in `region` of each of the block's parameters, in their order.
        transfer: The transfer that fetches the shard, if one is pending.
        buffer: The pinned buffer that the shard is read into for a CUDA device; None if it is not read.
    """

    name: str
    module: nn.Module
    region: Region
    starts: Sequence[int]
    transfer: Transfer = field(default_factory=Transfer)
    buffer: Memory | None = None


class SpilledParameters(Places):
    """The shards of a module's blocks in a store, from `take_over` on.

    Args:
        blocks: The blocks that `fully_shard` was applied to, by name, in the order in which they run.
        store: The store that holds the shards.
        ahead: How many blocks are prefetched.
        copies: Copies to the CUDA device that gathers the shards; None if the device is the CPU.

    Raises:
        PlanError: The disk has too little free space.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], store: Store, *, ahead: int, copies: ShardCopies | None = None
    ) -> None:
        self._store, self._ahead, self._copies = store, ahead, copies
        self._buffers = PageBuffers(pinned=True, most=ahead + 1)
        self.blocks: dict[str, Spilled] = {}
        self.places: dict[Tensor, tuple[Spilled, int]] = {}
        self.gradients: GradientPlaces = GradientPlaces()
        self._undo = contextlib.ExitStack()
        self._order: dict[tuple[bool, str], str] = {}
        self._last: tuple[bool, str] | None = None
        for name, module in blocks.items():
            sizes = [aligned(data.nbytes) for _, data in compat.shards_of(module)]
            if sizes:
                self.blocks[name] = self._spilled(name, module, sizes)
        names = [*self.blocks]
        # The assumed order of the blocks, until a step has shown another.
        self._order |= {(False, one): other for one, other in itertools.pairwise(names)}
        self._order |= {(True, other): one for one, other in itertools.pairwise(names)}

    def _spilled(self, name: str, module: nn.Module, sizes: Sequence[int]) -> Spilled:
        region = Region(self._store, f"the parameters of {name}", sum(sizes))
        starts = [*itertools.accumulate(sizes, initial=0)][:-1]
        block = Spilled(name, module, region, starts)
        for (parameter, _), start in zip(compat.shards_of(module), starts, strict=True):
            self.places[parameter] = block, start
        return block

    def memory_of(self, parameter: Tensor) -> Tensor | None:
        """Return the memory in which to materialize the shard of a parameter; None if the shard is not offloaded."""
        found = self.places.get(parameter)
        if found is None:
            return None
        block, start = found
        local = local_of(parameter.detach())
        return block.region.tensor(local.dtype, local.shape, start)

    def take_over(self) -> None:
        """Move the shards that are still in memory, and fetch each block's shard before its all-gather from now on."""
        self.places.clear()
        for block in self.blocks.values():
            self._move(block)
            before, after = partial(self._before, block), partial(self._after, block)
            bring = None if self._copies is None else partial(self._bring, block)
            self._undo.callback(compat.around_gathers(block.module, before, after, bring))
        self._buffers.make_room(max((block.region.nbytes for block in self.blocks.values()), default=0))

    def _move(self, block: Spilled) -> None:
        shards = compat.shards_of(block.module)
        fresh = not any(data.numel() and block.region.holds(data) for _, data in shards)
        if fresh:
            block.region.claim()
        for (parameter, data), start in zip(shards, block.starts, strict=True):
            self.places[parameter] = block, start
            if not data.numel() or block.region.holds(data):
                continue
            memory = block.region.tensor(data.dtype, data.shape, start)
            memory.copy_(data)
            compat.place_shard(block.module, parameter, memory)
            if not fresh:
                let_rest(memory)
        if fresh:
            block.region.save().wait()
            block.region.drop()

    def keeps_shard(self, shard: Tensor) -> bool:
        """Return whether `shard` belongs to a block in the store."""
        return shard in self.places

    @contextlib.contextmanager
    def writing(self, shard: Tensor) -> Iterator[None]:
        """Context in which writes into the memory of `shard` persist, whether the shard is fetched or not."""
        found = self.places.get(shard)
        if found is None:
            yield
            return
        region, start = found[0].region, found[1]
        if region.in_dram:
            found[0].transfer.wait()
        try:
            yield
        finally:
            # The buffer was read before the write.
            self._drop_buffer(found[0])
        # A region at rest maps the file, so the write has already reached it.
        if region.in_dram:
            region.save(start, start + local_of(shard.detach()).nbytes)

    def settle(self) -> None:
        """Drop the shards that were fetched and not gathered."""
        for block in self.blocks.values():
            if block.region.in_dram:
                block.transfer.wait()
                block.region.drop()
            self._drop_buffer(block)
        self._end_pass()

    def stop(self) -> None:
        """Stop fetching. Parameters stay where they are, and reads of them go to the mapped file."""
        # The exception that ended the run has already reported a failed read.
        with contextlib.suppress(StoreError):
            self.settle()
        self._undo.close()

    def _before(self, block: Spilled) -> None:
        """Wait for the block's shard, and prefetch the shards of the next blocks."""
        backward = compat.current_node_sequence() is not None
        if self._last is not None and self._last[0] != backward:
            self._end_pass()
        elif self._last is not None and self._last[1] != block.name:
            self._order[self._last] = block.name
        self._last = backward, block.name
        wanted = [block.name]
        while len(wanted) <= self._ahead and (following := self._order.get((backward, wanted[-1]))) is not None:
            wanted.append(following)
        for name in wanted:
            self._fetch(self.blocks[name], wanted)
        block.transfer.wait()

    def _end_pass(self) -> None:
        """Record that nothing follows the last block of a forward or a backward."""
        if self._last is not None:
            self._order.pop(self._last, None)
        self._last = None

    def _fetch(self, block: Spilled, wanted: Collection[str] = ()) -> None:
        if self._copies is None:
            if not block.region.in_dram:
                block.transfer = block.region.fetch()
        elif block.buffer is None:
            self._make_room(wanted)
            block.buffer = self._buffers.take()
            block.transfer = block.region.read_into(block.buffer, 0, block.region.nbytes)
            block.transfer.on_failure(partial(self._return_buffer, block))

    def _make_room(self, wanted: Collection[str]) -> None:
        """Free the buffers of blocks that are not in `wanted`, if all buffers are in use."""
        held = [one for one in self.blocks.values() if one.buffer is not None]
        for one in held if len(held) > self._ahead else ():
            if one.name not in wanted:
                self._drop_buffer(one)

    @contextlib.contextmanager
    def _bring(self, block: Spilled, shards: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Context that yields copies on the CUDA device of the shards that were read."""
        assert self._copies is not None
        # Since the read, another block may have taken the buffer, or the shards may have been written to.
        self._fetch(block)
        block.transfer.wait()
        assert block.buffer is not None
        # A shard that was converted, as by `Module.to`, is in memory of its own.
        sources = [
            block.buffer.tensor(shard.dtype, shard.shape, start) if block.region.holds(shard) else shard.pin_memory()
            for shard, start in zip(shards, block.starts, strict=True)
        ]
        with self._copies.copies(sources) as (found, copied):
            self._return_buffer(block, copied)
            yield found

    def _drop_buffer(self, block: Spilled) -> None:
        """Give back the block's buffer, if it has one."""
        if block.buffer is not None:
            block.transfer.wait()
            self._return_buffer(block)

    def _return_buffer(self, block: Spilled, copied: Transfer | None = None) -> None:
        assert block.buffer is not None
        self._buffers.give_back(block.buffer, copied or Transfer())
        block.buffer = None

    def _after(self, block: Spilled) -> None:
        """Drop the shard after the all-gather, whose result is a copy."""
        if self._copies is None:
            block.region.drop()

    # The `Places` interface, for an optimizer's pages

    def bytes_per_element(self, entry: ParamEntry) -> int:
        """Return the bytes per element of the parameter, and of its gradient if gradients are offloaded too."""
        if entry.parameter not in self.places:
            return 0
        size = entry.local.element_size()
        return 2 * size if self.gradients.leave else size

    def moved_bytes(self, page: Page) -> int:
        """Return the bytes that `read` reads for the page's slices."""
        return sum(
            aligned((span.stop - span.start) * span.entry.local.element_size()) * (1 + self.gradients.leave)
            for span in page.slices
            if span.entry.parameter in self.places
        )

    def keeps(self, entry: ParamEntry) -> bool:
        """Return whether the parameter of `entry` is not offloaded."""
        return entry.parameter not in self.places

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to read the elements of the page, and their gradients, into `buffer`."""
        transfers = []
        for span in page.slices:
            if span.entry.parameter in self.places:
                block, _ = self.places[span.entry.parameter]
                block.transfer.wait()
        for region, start, length, place, _ in self._stretches(page, at):
            transfers.append(region.read_into(buffer, start, start + aligned(length), place))
        return transfers

    def write(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to write the elements of the page back."""
        for span in page.slices:
            if span.entry.parameter in self.places:
                # The buffer holds the values from before the step.
                self._drop_buffer(self.places[span.entry.parameter][0])
        return [
            region.write_from(buffer, start, start + aligned(length), place)
            for region, start, length, place, of_gradient in self._stretches(page, at)
            if not of_gradient
        ]

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the elements of each slice and their gradient; None if they have no gradient."""
        found = {(start, region): place for region, start, _, place, _ in self._stretches(page, at)}
        for span in page.slices:
            entry, gradient = span.entry, span.entry.parameter.grad
            own = None if gradient is None else local_of(gradient)
            shape = entry.local.shape if span.whole else (span.stop - span.start,)

            def view(region: Region, start: int, like: Tensor, shape: Sequence[int] = shape) -> Tensor:
                assert buffer is not None
                return buffer.tensor(like.dtype, shape, found[start, region])

            values = elements(entry.local, span)
            if entry.parameter in self.places:
                block, first = self.places[entry.parameter]
                values = view(block.region, first + span.start * values.element_size(), values)
            if own is None or gradient is None:
                yield values, None
                continue
            region = self.gradients.region_of(own)
            if region is None:
                yield values, elements(own, span)
                continue
            moved = view(region, region.start_of(own) + span.start * own.element_size(), own)
            yield values, self.gradients.changed(gradient, moved)

    def _stretches(self, page: Page, at: int) -> Iterator[tuple[Region, int, int, int, bool]]:
        """Yield the byte ranges of a page's offloaded parameters and gradients, slice by slice.

        Yields:
            The region, the first byte in it, the number of bytes, the first byte in the buffer, and whether the range
            is of a gradient.
        """
        for span in page.slices:
            parameter, count = span.entry.parameter, span.stop - span.start
            found: list[tuple[Region, int, int, bool]] = []
            if parameter in self.places:
                (block, first), size = self.places[parameter], span.entry.local.element_size()
                found.append((block.region, first + span.start * size, count * size, False))
            own = None if parameter.grad is None else local_of(parameter.grad)
            region = None if own is None else self.gradients.region_of(own)
            if own is not None and region is not None:
                size = own.element_size()
                found.append((region, region.start_of(own) + span.start * size, count * size, True))
            for one, start, length, of_gradient in found:
                yield one, start, length, at, of_gradient
                at += aligned(length)


def bring_back(module: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Copy the parameters of `module` that an earlier plan has left on a disk to DRAM.

    Args:
        module: The module, sharded or not.
        blocks: The blocks that `fully_shard` was applied to, by name.
    """
    for block in blocks.values():
        for parameter, data in compat.shards_of(block):
            if at_rest(data):
                compat.place_shard(block, parameter, data.clone())
    for parameter in module.parameters():
        plain = not isinstance(parameter, DTensor) and not is_lazy(parameter) and is_plain(parameter)
        if plain and at_rest(parameter):
            parameter.data = parameter.data.clone()


class GradientPlaces:
    """Gradients that stay in memory."""

    leave = False

    def region_of(self, gradient: Tensor) -> Region | None:
        """Return the region of the store that holds `gradient`; None if it is in memory."""
        return None

    def changed(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Return `values`, read from `gradient`, after applying the gradient's deferred changes."""
        return values
