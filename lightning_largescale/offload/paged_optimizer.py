"""Any optimizer on state that is in another tier: paged in, stepped on, and paged out, while others come and go.

The user's optimizer stays, and so do its groups, which schedulers hold. Its state stays where torch has it, in
`optimizer.state`, as tensors that map the store's file: a checkpoint or a callback reads them as any others. For the
time of a step the optimizer has, instead of its parameters, those of one page after the other, and steps on each with
its own code. The last page is left for the step that was called, so that hooks are called once.

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
from lightning_largescale.offload.paged_state import PagedState
from lightning_largescale.offload.pages import Page, ParamEntry
from lightning_largescale.offload.places import Places
from lightning_largescale.offload.store import Store, StoreError, Transfer
from lightning_largescale.offload.turn import Turn
from lightning_largescale.optimizing import bare_step, closure_first, hold, vectorized

# Pages that are on their way in while one is stepped on.
_AHEAD = 2


class PagedOptimizer:
    """Makes an optimizer step page by page, until `undo`; numbers are those of a step on all at once, bit for bit.

    Args:
        optimizer: over parameters as they are trained, divided among ranks or not.
        store: where the state is kept; None for DRAM.
        buffers: that pages go through.
        resident: how many bytes of state stay on the device; what is taken is taken off. The next likewise.
        dram: how many of those that leave it stay in DRAM, where there is a store.
        places: where the parameters and their gradients are; None for memory.
        lanes: to the device, where that is not DRAM's: what is stepped on there is brought, and taken back.
        label_of: parameters with different labels are stepped on apart, as `step_on` asks for.

    Attributes:
        optimizer: as given, without Lightning's wrapper.
        paged: where its state is.

    Raises:
        PlanError: it cannot step on some parameters after the others, or the disk has not as many bytes.
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
        # What turns have made of the state of parameters, of which others may be on their way yet.
        self._made: dict[ParamEntry, dict[str, Any]] = {}
        # What the groups have beside parameters, as the step began.
        self._options: list[dict[str, Any]] | None = None
        self._turns: Generator[None, None, None] | None = None
        # Pages that are read before it is their turn.
        self._expected: dict[Page, tuple[Memory | None, Transfer]] = {}
        # A step may call its base class's, which calls the hooks too.
        self._depth = 0
        self.paged.lay_out(early=True)
        self._remove_hooks = compat.hook_nearest(self.optimizer, self._before, self._after)
        vars(self.optimizer)["load_state_dict"] = partial(self.paged.load, self.optimizer.load_state_dict)

    def undo(self) -> None:
        """Let the optimizer step as it did; its state stays where it is."""
        self.forget_step()
        self._remove_hooks()
        vars(self.optimizer).pop("load_state_dict", None)

    def forget_step(self) -> None:
        """Let the optimizer hold its parameters again after a step that raised."""
        self._depth, self._options = 0, None
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()
        self._give_back()
        # What went wrong was told by what ended the step.
        with suppress(StoreError):
            self._buffers.drain()

    def step_on(self, parameters: Collection[Tensor]) -> None:
        """Step on these alone, as a part of the step that is under way or comes next, which waits for what is still on
        its way then.
        """
        step = bare_step(self.optimizer)
        self.paged.lay_out()
        wanted = {*parameters}
        empty = [entry for entry in self._empty() if entry.parameter in wanted]
        pages = self._pages_of(wanted)
        for page in [page for page in self._expected if page not in pages]:
            # It is read again when it is its turn: buffers are few.
            self._take_back(*self._expected.pop(page))
        for _ in self._in_turn(pages, empty):
            with compat.without_step_hooks(self.optimizer):
                step()
        # Of parameters that have got no gradient.
        self._give_back()

    def expect(self, parameters: Collection[Tensor]) -> None:
        """Begin to read what `step_on` of these needs first."""
        pages = [page for page in self._pages_of({*parameters}) if self.paged.moves(page)]
        for page in pages[:_AHEAD]:
            # Copies of gradients are made when these are there.
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
        """What was expected and did not come."""
        for buffer, transfer in self._expected.values():
            self._take_back(buffer, transfer)
        self._expected.clear()

    def _take_back(self, buffer: Memory | None, transfer: Transfer) -> None:
        if buffer is not None:
            self._buffers.give_back(buffer, transfer)

    def state_of(self, parameter: Tensor, key: str) -> Tensor | torch.device | None:
        """The memory in which the state of `parameter` under `key` is kept, to be written into; DRAM where that is not
        known yet, None where there is none.
        """
        if self.paged.waits:
            return torch.device("cpu")
        entry = self.paged.entries.get(parameter)
        if entry is None or key not in entry.kind.dtypes or not entry.local.numel():
            return None
        return self.paged.view(entry, key)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The closure, and all turns but the last, which the step that was called is left with."""
        given = None
        if self._depth == 0:
            given = closure_first(args, kwargs)
            self.paged.lay_out()
            pages, empty, step = self.paged.pages, self._empty(), bare_step(self.optimizer)
            moved, stay = self._sorted(pages)
            count = len(moved) + len({*map(self.paged.by_host, stay)}) + bool(empty)
            if not count and self._options is not None:
                # What steps on some have made of the groups, the step that was called makes once more.
                for group, options in zip(self.optimizer.param_groups, self._options, strict=False):
                    hold(group, options, group["params"])
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
        """Parameters with gradients of which this rank has nothing."""
        entries = self.paged.entries.values()
        return [one for one in entries if not one.local.numel() and self.paged.is_live(one)]

    def _sorted(self, pages: Sequence[Page]) -> tuple[list[Page], list[Page]]:
        """Of those with gradients, pages of which something moves, and pages that stay."""
        found: tuple[list[Page], list[Page]] = [], []
        for page in pages:
            if any(self.paged.is_live(span.entry) for span in page.slices):
                found[not (self.paged.moves(page) or self.paged.crosses(page))].append(page)
        return found

    def _in_turn(self, pages: Sequence[Page], empty: Sequence[ParamEntry]) -> Generator[None, None, None]:
        """Have the optimizer hold the parameters of one page after the other, and in the end its own again."""
        moved, stay = self._sorted(pages)
        groups = self.optimizer.param_groups
        if self._options is None:
            self._options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        given = [group["params"] for group in groups]
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
                # The next is brought to the device while this one is taken from there.
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
            for group, params in zip(groups, given, strict=False):
                group["params"] = params
            try:
                # Those that have been stepped on are taken back, whatever became of the next.
                with suppress(StoreError):
                    end(0)
            finally:
                for _, buffer, transfer in (*coming, *leaving):
                    self._take_back(buffer, transfer)

    def _turn(
        self, places: Sequence[tuple[Page, Memory | None]], empty: Sequence[ParamEntry] = ()
    ) -> Generator[None, None, Transfer]:
        """Have the optimizer hold what is in some pages, and what stands for parameters that are empty here; what
        takes from the device what was brought there.
        """
        assert self._options is not None
        given = [*zip(self.optimizer.param_groups, self._options, self._options_of(places), strict=False)]
        for group, _, held in given:
            hold(group, held, [])
        turn = Turn(self.optimizer, self.paged, self._made)
        for page, buffer in places:
            lanes = self._lanes if self.paged.crosses(page) else None
            for span, values, gradient in self.paged.values(page, buffer):
                if gradient is not None and self.paged.is_live(span.entry):
                    turn.hold(span, values, gradient, self.paged.slots(page, span, buffer), lanes)
        for entry in empty:
            turn.hold_row(entry)
        try:
            yield
            return turn.end()
        finally:
            turn.leave()
            for group, options, held in given:
                group.update({key: value for key, value in options.items() if held[key] is not value})

    def _options_of(self, places: Sequence[tuple[Page, Memory | None]]) -> Sequence[dict[str, Any]]:
        """What the groups have beside parameters while some pages are stepped on."""
        assert self._options is not None
        if not any(self.paged.by_host(page) for page, _ in places):
            return self._options
        floating = all(span.entry.parameter.is_floating_point() for page, _ in places for span in page.slices)
        return [vectorized(self.optimizer, options, floating=floating) for options in self._options]

    def _keep_state(self) -> None:
        """Let parameters have what the turns of their slices have made of their state."""
        for entry in filter(self._made.__contains__, self.paged.entries.values()):
            # The dict stays: others may hold it.
            state = self.optimizer.state[entry.parameter]
            state.clear()
            state.update(self._made[entry])
