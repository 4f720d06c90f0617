"""Steps of a tape, carried out for real on the CPU; a storage lives from the first step that needs it to the last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_largescale import compat
from lightning_largescale.parallel.deferred.draws import Course, DeferredError
from lightning_largescale.parallel.deferred.portions import Portions, in_portions
from lightning_largescale.parallel.deferred.settings import set_again, settings_now
from lightning_largescale.parallel.deferred.tape import Cell, Held, Operation, ReplayStep, Tape, assigned

Keep = Callable[[Cell, torch.UntypedStorage], None]


def carry_out(tape: Tape, steps: list[ReplayStep], *, keep: Keep | None = None) -> Course:
    """Do `steps`, a plan of `tape`.

    Args:
        tape: the operations.
        steps: emptied on the way, so that takers and what they hold live no longer than needed.
        keep: called with what a cell that is no longer needed holds, if that is all as the last operation of the tape
            leaves it; generators' states are then kept on the way, too.

    Raises:
        DeferredError: an operation makes another layout than it said on the meta device.
    """
    run = _Run(tape, keep)
    settings = settings_now()
    steps.reverse()
    try:
        with compat.without_dispatch_modes(), compat.without_function_modes(), torch.no_grad():
            while steps:
                run.step(steps.pop())
    finally:
        set_again(settings)
    return run.course


def map_arguments(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Arguments of an operator with `change(one)` in place of each `kind`; lists are new."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_arguments(one, kind, change) for one in tree]) if type(tree) in (list, tuple) else tree
    if isinstance(tree, dict):
        return {name: map_arguments(one, kind, change) for name, one in tree.items()}
    return tree


def clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """A copy of what is stored."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()


def flat_leaves(tree: Any) -> list[Any]:
    """What nested lists and tuples hold, in order, tensors or not."""
    if isinstance(tree, (list, tuple)):
        return [leaf for one in tree for leaf in flat_leaves(one)]
    return [tree]


class _Run:
    def __init__(self, tape: Tape, keep: Keep | None) -> None:
        self._tape, self._keep = tape, keep
        self.course = Course(keep=keep is not None)
        self._storages: dict[Cell, torch.UntypedStorage] = {}

    def step(self, step: ReplayStep) -> None:
        operation = self._tape.operations[step.place] if step.place >= 0 else None
        if step.runs and operation is not None:
            if (target := in_portions(operation)) is not None and self._goes_at_once(step, target):
                self._draw_in_portions(step, operation, target)
                return
            unused = {cell for cell in step.frees if all(held.cell is not cell for held, _ in step.takers)}
            self._operate(operation, unused)
        for cell in step.loads:
            if cell.known is not None:
                # Nothing is written any more into what the last operation left.
                known = cell.known[1]
                self._storages[cell] = known if cell.last == step.place else clone_storage(known)
        for held, taker in step.takers:
            source = None if operation is None else assigned(operation, held)
            taker(self._tensor(held) if source is None else source)
        for cell in step.frees:
            storage = self._storages.pop(cell, None)
            if self._keep is not None and storage is not None and cell in step.whole and cell.last <= step.place:
                self._keep(cell, storage)

    def _goes_at_once(self, step: ReplayStep, target: Held) -> bool:
        """Whether what a draw fills is asked for by one taker at most, whole, and then by nobody."""
        alone = len(step.takers) <= 1 and all(held.is_same(target) for held, _ in step.takers)
        return alone and not step.loads and target.cell in step.frees and self._keep is None

    def _draw_in_portions(self, step: ReplayStep, operation: Operation, target: Held) -> None:
        draw = operation.draw
        if draw is None:
            raise DeferredError(f"{operation.func} was recorded without a draw")
        values = Portions(target, lambda out: operation.func(out, *operation.args[1:], **operation.kwargs))
        self.course.before(draw)
        for _, taker in step.takers:
            taker(values)
        values.finish()
        self.course.after(draw)
        for cell in step.frees:
            self._storages.pop(cell, None)

    def _tensor(self, held: Held) -> Tensor:
        storage = self._storages.get(held.cell)
        if storage is None:
            # Nothing that is needed was written into it before.
            storage = torch.empty(held.cell.nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
            self._storages[held.cell] = storage
        return held.among(storage)

    def _operate(self, operation: Operation, unused: set[Cell]) -> None:
        set_again(operation.settings)
        given: dict[int, Tensor] = {}

        def tensor(held: Held) -> Tensor:
            if id(held) not in given:
                given[id(held)] = self._tensor(held)
                if operation.grad is not None:
                    given[id(held)].requires_grad_(held.requires_grad)
            return given[id(held)]

        args = map_arguments(operation.args, Held, tensor)
        kwargs = map_arguments(operation.kwargs, Held, tensor)
        if operation.draw is not None:
            self.course.before(operation.draw)
        with nullcontext() if operation.grad is None else torch.set_grad_enabled(operation.grad):
            results = flat_leaves(operation.func(*args, **kwargs))
        if operation.draw is not None:
            self.course.after(operation.draw)
        taken = {id(one.untyped_storage()) for one in given.values()}
        for place, held in operation.makes:
            if held.cell in unused:
                continue
            self._storages[held.cell] = self._made(operation, results[place].detach(), held, taken)

    @staticmethod
    def _made(operation: Operation, result: Tensor, held: Held, taken: set[int]) -> torch.UntypedStorage:
        """The storage for the cell of `held`, of which `result` is what the operation returned."""
        laid_out = tuple(result.shape) == held.size and result.dtype == held.dtype
        if not laid_out or _steps(held.size, result.stride()) != _steps(held.size, held.stride):
            raise DeferredError(f"{operation.func} makes another layout on the CPU than on the meta device")
        storage = result.untyped_storage()
        fits = result.storage_offset() == held.offset and storage.nbytes() >= held.cell.nbytes
        if (
            fits
            and id(storage) not in taken
            and result.is_conj() == held.conjugate
            and result.is_neg() == held.negative
        ):
            taken.add(id(storage))
            return storage
        fresh = torch.empty(held.cell.nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        held.among(fresh).copy_(result)
        return fresh


def _steps(size: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """The strides that matter: where there is but one element, the meta device may say another."""
    return [] if 0 in size else [step for count, step in zip(size, stride, strict=True) if count != 1]
