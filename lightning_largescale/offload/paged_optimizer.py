"""Step any optimizer page by page, with its state offloaded to another tier.

While one page is stepped on, the next pages are read and the previous ones are written back. The user's optimizer
object and its parameter groups, which LR schedulers hold, stay in use. The state stays in `optimizer.state`, as tensors
that map the store's file, so checkpoints and callbacks read it like any other tensor. During a step the optimizer's
groups hold the elements of one page at a time in place of its parameters, and its own code steps each page. The last
page is left to the `step()` that the caller called, so that the step hooks run once.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2.2; Dettmers et al. 2023, "QLoRA", section 3 (paged
    optimizers).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.offload.buffers import Allowance, PageBuffers
from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.mapped_memory import Memory
from lightning_largescale.offload.page_step import PageStep
from lightning_largescale.offload.paged_state import PagedState
from lightning_largescale.offload.pages import Page, ParamEntry
from lightning_largescale.offload.places import Places
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.optimizers.closure import closure_first
from lightning_largescale.optimizers.fused import vectorized
from lightning_largescale.optimizers.local_view import bare_step, options_of, set_options

# Number of pages that are prefetched while another one is stepped on.
_AHEAD = 2


class PagedOptimizer:
    """Page-by-page stepping of an optimizer, until `undo`. Results equal those of the plain step bit for bit.

    Args:
        optimizer: The optimizer to page; its parameters may be sharded among ranks.
        store: The store that holds the state; None to keep it in DRAM.
        buffers: The buffers that pages go through.
        resident: Budget of bytes of state that stay on the device; the bytes that stay are deducted from it.
        dram: With a store, budget of bytes of offloaded state that stay in DRAM; deducted likewise.
        places: Where the parameters and their gradients are; None if they are in memory.
        lanes: Copies to and from the device, if the device has memory other than DRAM. They bring the state that is
            stepped on there, and take it back.
        label_of: The label of a parameter. Parameters with different labels never share a page, so that `step_on` can
            step them separately.

    Attributes:
        optimizer: The optimizer, without Lightning's wrapper.
        paged: The pages of its state.

    Raises:
        PlanError: The optimizer cannot be stepped on a subset of its parameters at a time, or the disk has too little
            free space.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        store: Store | None,
        buffers: PageBuffers,
        resident: Allowance | None = None,
        dram: Allowance | None = None,
        places: Places | None = None,
        lanes: Lanes | None = None,
        label_of: Callable[[Tensor], str] = lambda parameter: "",
    ) -> None:
        self.optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self._buffers, self._lanes = buffers, lanes
        self.paged = PagedState(
            self.optimizer,
            store=store,
            buffers=buffers,
            resident=resident or Allowance(0),
            dram=dram or Allowance(0),
            places=places or Places(),
            lanes=lanes,
            label_of=label_of,
        )
        # New state of the parameters of which at least one slice was stepped on.
        self._made: dict[ParamEntry, dict[str, Any]] = {}
        # The groups' options (all but "params") as they were when the step began.
        self._options: list[dict[str, Any]] | None = None
        self._turns: Generator[None, None, None] | None = None
        # Pages that are prefetched by `expect`, with their buffer and the transfer that fills it.
        self._expected: dict[Page, tuple[Memory | None, Transfer]] = {}
        # A step may call its base class's step, which calls the hooks too.
        self._depth = 0
        self.paged.lay_out(early=True)
        self._remove_hooks = compat.hook_nearest(self.optimizer, self._before, self._after)
        vars(self.optimizer)["load_state_dict"] = partial(self.paged.load, self.optimizer.load_state_dict)

    def undo(self) -> None:
        """Restore the optimizer's plain step; its state stays where it is."""
        self.forget_step()
        self._remove_hooks()
        vars(self.optimizer).pop("load_state_dict", None)

    def forget_step(self) -> None:
        """Put the optimizer's own parameters back into its groups after a step that raised."""
        self._depth, self._options = 0, None
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()
        self._give_back()
        # The exception that ended the step has already reported the failure.
        with suppress(StoreError):
            self._buffers.drain()

    def step_on(self, parameters: Collection[Tensor]) -> None:
        """Step on `parameters` only, as part of the current or the next step; that step waits for pending transfers."""
        step = bare_step(self.optimizer)
        self.paged.lay_out()
        wanted = {*parameters}
        empty = [entry for entry in self._empty() if entry.parameter in wanted]
        pages = self._pages_of(wanted)
        for page in [page for page in self._expected if page not in pages]:
            # Buffers are few, so the page is read again when it is needed.
            self._take_back(*self._expected.pop(page))
        for _ in self._in_turn(pages, empty):
            with compat.without_step_hooks(self.optimizer):
                step()
        # Pages that were prefetched and whose parameters have no gradient.
        self._give_back()

    def expect(self, parameters: Collection[Tensor]) -> None:
        """Prefetch the first pages that `step_on` needs for `parameters`."""
        pages = [page for page in self._pages_of({*parameters}) if self.paged.moves(page)]
        for page in pages[:_AHEAD]:
            # Pages whose gradients are copied are not prefetched: the gradients are not there yet.
            if page not in self._expected and not self.paged.copies(page):
                self._expected[page] = self._begun(page)

    def _pages_of(self, parameters: Set[Tensor]) -> list[Page]:
        return [page for page in self.paged.pages if any(one.entry.parameter in parameters for one in page.slices)]

    def _begun(self, page: Page) -> tuple[Memory | None, Transfer]:
        if not self.paged.moves(page):
            return None, Transfer()
        buffer = self._buffers.take()
        return buffer, self.paged.read(page, buffer)

    def _give_back(self) -> None:
        """Give back the buffers of pages that were prefetched and not stepped on."""
        for buffer, transfer in self._expected.values():
            self._take_back(buffer, transfer)
        self._expected.clear()

    def _take_back(self, buffer: Memory | None, transfer: Transfer) -> None:
        if buffer is not None:
            self._buffers.give_back(buffer, transfer)

    def state_of(self, parameter: Tensor, key: str) -> Tensor | torch.device | None:
        """Return the memory that holds the state of `parameter` under `key`, for writing into it.

        Returns:
            The tensor; the CPU device if it is not known yet what is paged; None if this state is not paged or the
            shard is empty.
        """
        if self.paged.waits:
            return torch.device("cpu")
        entry = self.paged.entries.get(parameter)
        if entry is None or key not in entry.spec.dtypes or not entry.local.numel():
            return None
        return self.paged.view(entry, key)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-step hook: evaluate the closure, then step every page but the last, which the caller's `step()` handles.

        Returns:
            The step's `(args, kwargs)` with a closure that only returns the loss; None in a nested step.
        """
        given = None
        if self._depth == 0:
            given = closure_first(args, kwargs)
            self.paged.lay_out()
            pages, empty, step = self.paged.pages, self._empty(), bare_step(self.optimizer)
            moved, stay = self._sorted(pages)
            count = len(moved) + len({*map(self.paged.by_host, stay)}) + bool(empty)
            if not count and self._options is not None:
                # `step_on` has already stepped on everything. The caller's step changes the groups' options once more,
                # so it has to begin with the options from before.
                for group, options in zip(self.optimizer.param_groups, self._options, strict=False):
                    set_options(group, options)
            self._turns = self._in_turn(pages, empty) if count else None
            with self._forgetting():
                for number in range(count):
                    next(self._turns)  # type: ignore[arg-type]
                    if number < count - 1:
                        with compat.without_step_hooks(optimizer):
                            step()
        self._depth += 1
        return given

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._turns is not None:
            with self._forgetting():
                next(self._turns, None)
        self._turns = self._options = None
        self._give_back()
        self._buffers.drain()

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.forget_step()
            raise

    def _empty(self) -> list[ParamEntry]:
        """Return the parameters that have a gradient and of which this rank's shard is empty."""
        entries = self.paged.entries.values()
        return [one for one in entries if not one.local.numel() and self.paged.is_live(one)]

    def _sorted(self, pages: Sequence[Page]) -> tuple[list[Page], list[Page]]:
        """Split the pages that have gradients into those that need a transfer and those that stay in place."""
        found: tuple[list[Page], list[Page]] = [], []
        for page in pages:
            if any(self.paged.is_live(span.entry) for span in page.slices):
                found[not (self.paged.moves(page) or self.paged.crosses(page))].append(page)
        return found

    def _in_turn(self, pages: Sequence[Page], empty: Sequence[ParamEntry]) -> Generator[None, None, None]:
        """Put the pages into the optimizer's groups one after the other, and restore its parameters at the end.

        Yields:
            Once per turn, when the optimizer is ready to step.
        """
        moved, stay = self._sorted(pages)
        if self._options is None:
            self._options = [options_of(group) for group in self.optimizer.param_groups]
        coming, ahead = deque[tuple[Page, Memory | None, Transfer]](), iter(moved)
        leaving = deque[tuple[Page, Memory | None, Transfer]]()

        def begin() -> None:
            page = next(ahead, None)
            if page is not None:
                coming.append((page, *(self._expected.pop(page, None) or self._begun(page))))

        def end(most: int) -> None:
            while len(leaving) > most:
                page, buffer, taken = leaving[0]
                taken.wait()
                written = Transfer() if buffer is None else self.paged.write(page, buffer)
                leaving.popleft()
                self._take_back(buffer, written)

        try:
            for _ in range(_AHEAD):
                begin()
            while coming:
                begin()
                page, buffer, transfer = coming[0]
                transfer.wait()
                leaving.append((page, buffer, (yield from self._turn([(page, buffer)]))))
                coming.popleft()
                # With lanes, the next page is copied to the device while this one is copied from it.
                end(0 if self._lanes is None else 1)
            end(0)
            for by_host in (False, True):
                at_once = [(page, None) for page in stay if self.paged.by_host(page) == by_host]
                if at_once:
                    yield from self._turn(at_once)
            if empty:
                yield from self._turn([], empty)
            self._keep_state()
        finally:
            self._made.clear()
            try:
                # Pages that were stepped on are written back even if a later one failed.
                with suppress(StoreError):
                    end(0)
            finally:
                for _, buffer, transfer in (*coming, *leaving):
                    self._take_back(buffer, transfer)

    def _turn(
        self, places: Sequence[tuple[Page, Memory | None]], empty: Sequence[ParamEntry] = ()
    ) -> Generator[None, None, Transfer]:
        """Put some pages, and placeholders for empty shards, into the optimizer's groups for one step.

        Returns:
            The transfer that copies state from the device back to DRAM.
        """
        assert self._options is not None
        given = [*zip(self.optimizer.param_groups, self._options, self._options_of(places), strict=False)]
        for group, _, held in given:
            set_options(group, held)
        step = PageStep(self.optimizer, self.paged, self._made)
        try:
            for page, buffer in places:
                lanes = self._lanes if self.paged.crosses(page) else None
                for span, values, gradient in self.paged.values(page, buffer):
                    if gradient is not None and self.paged.is_live(span.entry):
                        step.hold_slice(span, values, gradient, self.paged.slots(page, span, buffer), lanes)
            for entry in empty:
                step.hold_row(entry)
            yield
            return step.store()
        finally:
            step.close()
            for group, options, held in given:
                group.update({key: value for key, value in options.items() if held[key] is not value})

    def _options_of(self, places: Sequence[tuple[Page, Memory | None]]) -> Sequence[dict[str, Any]]:
        """Return the groups' options (all but "params") for the step on some pages."""
        assert self._options is not None
        if not any(self.paged.by_host(page) for page, _ in places):
            return self._options
        floating = all(span.entry.parameter.is_floating_point() for page, _ in places for span in page.slices)
        return [vectorized(self.optimizer, options, floating=floating) for options in self._options]

    def _keep_state(self) -> None:
        """Store the state that the turns computed in `optimizer.state`, under the optimizer's own parameters."""
        for entry in filter(self._made.__contains__, self.paged.entries.values()):
            # The dict object stays, since other code may hold a reference to it.
            state = self.optimizer.state[entry.parameter]
            state.clear()
            state.update(self._made[entry])
