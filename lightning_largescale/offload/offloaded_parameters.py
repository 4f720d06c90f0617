"""Parameters and gradients of a sharded module's blocks in another tier.

A block's shard is fetched before the block is gathered and dropped when it has been, in forward and in backward; those
that follow are fetched meanwhile, in the order of the step before. Gradients leave as they come. With one rank the
shard is the whole, and all else is the same. For a CUDA device a shard is read into pinned memory, and stays at rest.

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
from lightning_largescale.hardware.usage import at_rest, let_rest
from lightning_largescale.offload.buffers import PageBuffers
from lightning_largescale.offload.mapped_memory import Memory, Region
from lightning_largescale.offload.pages import Page, ParamEntry, local_of
from lightning_largescale.offload.places import Places, elements
from lightning_largescale.offload.shards import ShardCopies
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.tiers import aligned
from lightning_largescale.workload.kinds import is_plain


@dataclass(eq=False)
class Spilled:
    """A block whose shard is elsewhere.

    Attributes:
        name: of the block.
        module: the block, which `fully_shard` was applied to.
        region: where the shard is.
        starts: the first byte there of each parameter, by its place among those of the block.
        transfer: that brings it, if one is under way.
        buffer: into which it is read for a CUDA device.
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
        blocks: that `fully_shard` was applied to, by name, in the order in which they run.
        store: where they go.
        ahead: how many blocks are fetched before it is their turn.
        copies: to the CUDA device that gathers them; None where DRAM is the memory of what does.

    Raises:
        PlanError: the disk has not as many bytes.
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
        # Until a step has shown another.
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
        """Where the shard of a parameter that has no values yet is to be made; None where it stays in memory."""
        found = self.places.get(parameter)
        if found is None:
            return None
        block, start = found
        local = local_of(parameter.detach())
        return block.region.tensor(local.dtype, local.shape, start)

    def take_over(self) -> None:
        """Move what is still in memory, and fetch from now on what is about to be gathered."""
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
        """Whether it is one of a block that is in the store."""
        return shard in self.places

    @contextlib.contextmanager
    def writing(self, shard: Tensor) -> Iterator[None]:
        """Within, what is written into the memory of the shard stays, whether it is fetched or not."""
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
            # It was read before.
            self._drop_buffer(found[0])
        # At rest it is the file.
        if region.in_dram:
            region.save(start, start + local_of(shard.detach()).nbytes)

    def settle(self) -> None:
        """Drop what was fetched for a turn that has not come."""
        for block in self.blocks.values():
            if block.region.in_dram:
                block.transfer.wait()
                block.region.drop()
            self._drop_buffer(block)
        self._end_pass()

    def stop(self) -> None:
        """Fetch no more; parameters stay where they are, and are read from there by whoever reads them."""
        # What could not be read was told of by what ended the run.
        with contextlib.suppress(StoreError):
            self.settle()
        self._undo.close()

    def _before(self, block: Spilled) -> None:
        """Have the shard there, and those that follow on their way."""
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
        """Nothing follows the last block of a forward or a backward."""
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
        """Have a buffer free, where too many were read into for turns that did not come."""
        held = [one for one in self.blocks.values() if one.buffer is not None]
        for one in held if len(held) > self._ahead else ():
            if one.name not in wanted:
                self._drop_buffer(one)

    @contextlib.contextmanager
    def _bring(self, block: Spilled, shards: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Within, copies of the shards on the CUDA device, of what was read of them."""
        assert self._copies is not None
        # Others may have needed its room, or have written into the shards, since it was read.
        self._fetch(block)
        block.transfer.wait()
        assert block.buffer is not None
        pairs = zip(shards, block.starts, strict=True)
        sources = [block.buffer.tensor(shard.dtype, shard.shape, start) for shard, start in pairs]
        with self._copies.copies(sources) as (found, copied):
            self._return_buffer(block, copied)
            yield found

    def _drop_buffer(self, block: Spilled) -> None:
        """Let what was read of the block go, if something was."""
        if block.buffer is not None:
            block.transfer.wait()
            self._return_buffer(block)

    def _return_buffer(self, block: Spilled, copied: Transfer | None = None) -> None:
        assert block.buffer is not None
        self._buffers.give_back(block.buffer, copied or Transfer())
        block.buffer = None

    def _after(self, block: Spilled) -> None:
        """What was gathered is a copy."""
        if self._copies is None:
            block.region.drop()

    # As the places of an optimizer's pages

    def bytes_per_element(self, entry: ParamEntry) -> int:
        """Of the parameter, and of its gradient where that is elsewhere too."""
        if entry.parameter not in self.places:
            return 0
        size = entry.local.element_size()
        return 2 * size if self.gradients.leave else size

    def moved_bytes(self, page: Page) -> int:
        """What `read` brings of the page's slices."""
        return sum(
            aligned((span.stop - span.start) * span.entry.local.element_size()) * (1 + self.gradients.leave)
            for span in page.slices
            if span.entry.parameter in self.places
        )

    def keeps(self, entry: ParamEntry) -> bool:
        """Not, where it is elsewhere."""
        return entry.parameter not in self.places

    def read(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to bring the elements of the page, and their gradients, into `buffer`."""
        transfers = []
        for span in page.slices:
            if span.entry.parameter in self.places:
                block, _ = self.places[span.entry.parameter]
                block.transfer.wait()
        for region, start, length, place, _ in self._stretches(page, at):
            transfers.append(region.read_into(buffer, start, start + aligned(length), place))
        return transfers

    def write(self, page: Page, buffer: Memory, at: int) -> Sequence[Transfer]:
        """Begin to take the elements of the page back."""
        for span in page.slices:
            if span.entry.parameter in self.places:
                # It is read again, with what the step has made of it.
                self._drop_buffer(self.places[span.entry.parameter][0])
        return [
            region.write_from(buffer, start, start + aligned(length), place)
            for region, start, length, place, of_gradient in self._stretches(page, at)
            if not of_gradient
        ]

    def values(self, page: Page, buffer: Memory | None, at: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The elements of each slice, and their gradient."""
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
        """Of a page's parameters, then of their gradients, that are elsewhere: the region, the first byte there, how
        many, the first byte in the buffer, and whether it is a gradient.
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
    """Have in DRAM what an earlier plan has left on a disk of the parameters of `module`.

    Args:
        module: sharded or not.
        blocks: that `fully_shard` was applied to, if it is.
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
    """Where gradients are: in memory."""

    leave = False

    def region_of(self, gradient: Tensor) -> Region | None:
        """Of the store, where it is kept; None where it is in memory."""
        return None

    def changed(self, gradient: Tensor, values: Tensor) -> Tensor:
        """`values` of it with the changes that were left for when it is read."""
        return values
