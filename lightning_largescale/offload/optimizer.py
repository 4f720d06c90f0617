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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.offload.buffers import Allowance, Buffers
from lightning_largescale.offload.memory import Memory, Region
from lightning_largescale.offload.pages import Bundle, Member, Page, Piece, bundles_of, local_of
from lightning_largescale.offload.places import Places, elements
from lightning_largescale.offload.store import Store, Transfer
from lightning_largescale.offload.trial import ask_kinds, kind_key
from lightning_largescale.optimizing import bare_step, closure_first
from lightning_largescale.plan import PlanError

# Pages that are on their way in while one is stepped on.
_AHEAD = 2

ToWhole = Callable[[Tensor, str, Tensor], Tensor]


def as_divided(parameter: Tensor, key: str, tensor: Tensor) -> Tensor:
    """State of this rank's part of a parameter as a part of the whole parameter's state, where it has its shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.to_local().shape:
        return tensor
    return DTensor.from_local(
        tensor,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class PagedOptimizer:
    """Makes an optimizer step page by page, until `undo`; numbers are those of a step on all at once, bit for bit.

    Args:
        optimizer: over parameters as they are trained, divided among ranks or not.
        store: where the state is kept; None for DRAM.
        buffers: that pages go through.
        resident: how many bytes of state stay in memory; what is taken is taken off.
        places: where the parameters and their gradients are; None for memory.
        label_of: parameters with different labels are stepped on apart, as `step_on` asks for.
        to_whole: what a tensor of the state of this rank's part of a parameter is in the state of the parameter: of
            which, under which key, and the tensor.

    Attributes:
        optimizer: as given, without Lightning's wrapper.
        pages: those that its parameters are cut into.

    Raises:
        PlanError: it cannot step on some parameters after the others, or the disk has not as many bytes.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        store: Store | None,
        buffers: Buffers,
        resident: Allowance | None = None,
        places: Places | None = None,
        label_of: Callable[[Tensor], str] = lambda parameter: "",
        to_whole: ToWhole = as_divided,
    ) -> None:
        self.optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self._store, self._buffers, self._resident = store, buffers, resident or Allowance(0)
        self._places, self._label_of, self._to_whole = places or Places(), label_of, to_whole
        self.pages: list[Page] = []
        self._regions: dict[Bundle, Region] = {}
        self._stay: set[Page] = set()
        self._known: dict[Tensor, Member] = {}
        self._views: dict[tuple[Member, str], Tensor] = {}
        self._bundle_of: dict[Member, Bundle] = {}
        self._made: dict[Member, dict[str, Any]] = {}
        self._values: list[dict[str, Any]] | None = None
        self._turns: Generator[None, None, None] | None = None
        # A step may call its base class's, which calls the hooks too.
        self._depth = 0
        self._lay_out()
        self._remove_hooks = compat.hook_nearest(self.optimizer, self._before, self._after)

    def undo(self) -> None:
        """Let the optimizer step as it did; its state stays where it is."""
        self.forget_step()
        self._remove_hooks()

    def forget_step(self) -> None:
        """Let the optimizer hold its parameters again after a step that raised."""
        self._depth, self._values = 0, None
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.close()

    def step_on(self, parameters: Sequence[Tensor]) -> None:
        """Step on these alone, as a part of the step that is under way or comes next."""
        wanted = {id(parameter) for parameter in parameters}
        pages = [page for page in self.pages if any(id(piece.member.parameter) in wanted for piece in page.pieces)]
        step = bare_step(self.optimizer)
        with torch.no_grad():
            for _ in self._in_turn(pages):
                step()

    def state_of(self, parameter: Tensor, key: str) -> Tensor | None:
        """The memory in which the state of `parameter` under `key` is kept, to be written into; None where there is
        none.
        """
        member = self._known.get(parameter)
        if member is None or key not in member.kind.dtypes or not member.local.numel():
            return None
        return self._view(member, key)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The closure, and all pages but the last, which the step that was called is left with."""
        given = None
        if self._depth == 0:
            given = closure_first(args, kwargs)
            self._lay_out()
            turns, step = self._in_turn(self.pages), bare_step(self.optimizer)
            self._turns = turns if (count := self._count_turns(self.pages)) else None
            with self._forgetting():
                for number in range(count):
                    next(turns)
                    if number < count - 1:
                        step()
        self._depth += 1
        return given

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0 and self._turns is not None:
            with self._forgetting():
                next(self._turns, None)
            self._turns = None
        if self._depth == 0:
            self._values = None

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.forget_step()
            raise

    # Layout

    def _lay_out(self) -> None:
        """Find the pages of parameters that came since."""
        fresh = [
            (parameter, number)
            for number, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
            if parameter not in self._known
        ]
        if not fresh:
            return
        kinds = ask_kinds(self.optimizer, fresh)
        members = [
            Member(parameter, number, kinds[kind_key(parameter, number)], self._label_of(parameter))
            for parameter, number in fresh
        ]
        self._known.update({member.parameter: member for member in members})
        for bundle in bundles_of(members):
            self._place(bundle)
        for member in members:
            self._take_over(member)

    def _place(self, bundle: Bundle) -> None:
        """Set space for the state of `bundle` aside, as far as it does not stay in memory."""
        moved = self._places.bytes_per_element(bundle.members[0])
        pages = [*bundle.pages(moved)]
        name = f"the optimizer state of {len(bundle.members)} parameters ({type(self.optimizer).__name__})"
        stays = self._store is None or not bundle.nbytes
        region = Region(None if stays else self._store, name, bundle.nbytes)
        for page in pages:
            if stays or self._resident.take(page.state_bytes):
                self._stay.add(page)
                for key in bundle.dtypes:
                    region.keep(*bundle.stretch(key, page.start, page.stop))
            if self._moves(page):
                self._buffers.make_room(self._page_bytes(page))
        self.pages += pages
        self._regions[bundle] = region
        self._bundle_of.update(dict.fromkeys(bundle.members, bundle))

    def _take_over(self, member: Member) -> None:
        """Move state that the optimizer made with its groups, before the first step."""
        state = self.optimizer.state.get(member.parameter, {})
        for key in member.kind.dtypes:
            value = state.get(key)
            if self._is_paged(member, value):
                view = self._view(member, key)
                view.copy_(local_of(value))
                self._regions[self._bundle_of[member]].rest(view)
                state[key] = self._to_whole(member.parameter, key, view)

    def _view(self, member: Member, key: str) -> Tensor:
        """The state of `member` under `key`, where it is kept."""
        if (member, key) not in self._views:
            bundle = self._bundle_of[member]
            start = bundle.start_of(member, key)
            shape, dtype = member.local.shape, bundle.dtypes[key]
            self._views[member, key] = self._regions[bundle].tensor(dtype, shape, start)
        return self._views[member, key]

    # Turns

    def _count_turns(self, pages: Sequence[Page]) -> int:
        moved, stay = self._sorted(pages)
        return len(moved) + bool(stay)

    def _sorted(self, pages: Sequence[Page]) -> tuple[list[Page], list[Page]]:
        """Of those with gradients, pages that move, and pages that stay."""
        live = [page for page in pages if any(_has_gradient(piece) for piece in page.pieces)]
        return [page for page in live if self._moves(page)], [page for page in live if not self._moves(page)]

    def _moves(self, page: Page) -> bool:
        """Whether anything of `page` is elsewhere between steps."""
        return page not in self._stay or self._places.moved_bytes(page) > 0

    def _in_turn(self, pages: Sequence[Page]) -> Generator[None, None, None]:
        """Have the optimizer hold the parameters of one page after the other, and in the end its own again."""
        moved, stay = self._sorted(pages)
        groups = self.optimizer.param_groups
        if self._values is None:
            self._values = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        given = [group["params"] for group in groups]
        coming, ahead = deque[tuple[Page, Memory, Transfer]](), iter(moved)
        leaving = deque[tuple[Memory, Transfer]]()

        def begin() -> None:
            page = next(ahead, None)
            if page is not None:
                buffer = self._buffers.take(leaving)
                coming.append((page, buffer, self._read(page, buffer)))

        try:
            for _ in range(_AHEAD):
                begin()
            while coming:
                begin()
                page, buffer, transfer = coming.popleft()
                leaving.append((buffer, transfer))
                transfer.wait()
                turn = _Turn(self, [(page, buffer)])
                yield
                turn.end()
                leaving.pop()
                leaving.append((buffer, self._write(page, buffer)))
            if stay:
                turn = _Turn(self, [(page, None) for page in stay])
                yield
                turn.end()
            self._keep_state()
        finally:
            self._made.clear()
            for group, params in zip(groups, given, strict=False):
                group["params"] = params
            self._buffers.give_back([*((buffer, transfer) for _, buffer, transfer in coming), *leaving])

    def _keep_state(self) -> None:
        """Let parameters have what steps on their pieces have made of their state, once all are through."""
        for member in filter(self._made.__contains__, self._known.values()):
            # The dict stays: others may hold it.
            state = self.optimizer.state[member.parameter]
            state.clear()
            state.update(self._made[member])

    def _page_bytes(self, page: Page) -> int:
        return self._after_state(page) + self._places.moved_bytes(page)

    def _after_state(self, page: Page) -> int:
        """Where in a buffer the state of a page ends, and what else moves with it begins."""
        return 0 if page in self._stay else page.state_bytes

    def _segments(self, page: Page) -> Iterator[tuple[str, int, int, int]]:
        """Keys, with the bytes of the region that they have in a page, and where these are in a buffer."""
        at = 0
        for key in page.bundle.dtypes if page not in self._stay else ():
            start, stop = page.bundle.stretch(key, page.start, page.stop)
            yield key, start, stop, at
            at += stop - start

    def _read(self, page: Page, buffer: Memory) -> Transfer:
        region = self._regions[page.bundle]
        transfers = []
        if any(self._is_here(piece.member, key) for piece in page.pieces for key in page.bundle.dtypes):
            transfers = [region.read_into(buffer, start, stop, at) for _, start, stop, at in self._segments(page)]
        return Transfer.of([*transfers, *self._places.read(page, buffer, self._after_state(page))])

    def _write(self, page: Page, buffer: Memory) -> Transfer:
        region = self._regions[page.bundle]
        transfers = [region.write_from(buffer, start, stop, at) for _, start, stop, at in self._segments(page)]
        return Transfer.of([*transfers, *self._places.write(page, buffer, self._after_state(page))])

    def _is_here(self, member: Member, key: str) -> bool:
        """Whether the state of `member` under `key` is what the region has, and not another's tensor."""
        value = self.optimizer.state.get(member.parameter, {}).get(key)
        if not self._is_paged(member, value):
            return False
        return self._regions[self._bundle_of[member]].holds(local_of(value))

    def _is_paged(self, member: Member, value: Any) -> bool:
        return isinstance(value, Tensor) and member.local.numel() > 0 and local_of(value).shape == member.local.shape


class _Turn:
    """The time in which the optimizer holds the parameters of some pages.

    Args:
        paged: its owner.
        places: pages, with the buffers that they are in; None for those that stay in memory.
    """

    def __init__(self, paged: PagedOptimizer, places: Sequence[tuple[Page, Memory | None]]) -> None:
        self._paged, self._optimizer = paged, paged.optimizer
        self._held: list[tuple[Piece, nn.Parameter, Tensor, Mapping[str, Tensor]]] = []
        assert paged._values is not None
        for group, options in zip(self._optimizer.param_groups, paged._values, strict=False):
            group.update(options)
            group["params"] = []
        for page, buffer in places:
            found = paged._places.values(page, buffer, paged._after_state(page))
            for piece, (values, gradient) in zip(page.pieces, found, strict=True):
                if _has_gradient(piece):
                    self._hold(page, piece, buffer, values, gradient)

    def _hold(self, page: Page, piece: Piece, buffer: Memory | None, values: Tensor, gradient: Tensor | None) -> None:
        member = piece.member
        part = nn.Parameter(values, requires_grad=member.parameter.requires_grad)
        part.grad = gradient
        slots = self._slots(page, piece, buffer)
        state = self._optimizer.state.get(member.parameter)
        if state:
            self._optimizer.state[part] = self._state_of(piece, state, slots)
        self._optimizer.param_groups[member.group]["params"].append(part)
        self._held.append((piece, part, values, slots))

    def _slots(self, page: Page, piece: Piece, buffer: Memory | None) -> dict[str, Tensor]:
        """Where the state of `piece` is for now, by key."""
        member, slots = piece.member, {}
        shape = member.local.shape if piece.whole else (piece.stop - piece.start,)
        if page in self._paged._stay:
            return {key: elements(self._paged._view(member, key), piece) for key in page.bundle.dtypes}
        assert buffer is not None
        for key, _, _, at in self._paged._segments(page):
            dtype = page.bundle.dtypes[key]
            slots[key] = buffer.tensor(dtype, shape, at + (piece.at - page.start) * dtype.itemsize)
        return slots

    def _state_of(self, piece: Piece, state: Mapping[str, Any], slots: Mapping[str, Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in state.items():
            slot = slots.get(key)
            if slot is not None and self._paged._is_paged(piece.member, value):
                if not self._paged._is_here(piece.member, key):
                    slot.copy_(elements(local_of(value), piece))
                found[key] = slot
            else:
                # Of several pieces each counts its steps.
                apart = isinstance(value, Tensor) and not piece.whole
                found[key] = local_of(value).clone() if apart else value
        return found

    def end(self) -> None:
        """Take what the step has made of them."""
        for piece, part, values, slots in self._held:
            if values.data_ptr() != part.data_ptr():
                # Some write a new tensor into `parameter.data`.
                values.copy_(part.detach())
            made = self._optimizer.state.pop(part, None)
            if made is not None:
                self._keep(piece, made, slots)

    def _keep(self, piece: Piece, made: dict[str, Any], slots: Mapping[str, Tensor]) -> None:
        member = piece.member
        kept: dict[str, Any] = {}
        for key, value in made.items():
            slot = slots.get(key)
            if slot is None or not isinstance(value, Tensor) or value.shape != slot.shape:
                kept[key] = value
                continue
            if value.data_ptr() != slot.data_ptr():
                slot.copy_(value)
            kept[key] = self._paged._to_whole(member.parameter, key, self._paged._view(member, key))
        self._paged._made[member] = kept


def _has_gradient(piece: Piece) -> bool:
    gradient = piece.member.parameter.grad
    if gradient is None:
        return False
    if local_of(gradient).is_sparse:
        raise PlanError(
            f"the gradient of a parameter of shape {tuple(piece.member.parameter.shape)} is sparse, and optimizer state"
            " that is paged takes none; make its module without sparse=True, or leave out offload_optimizer."
        )
    return True
