"""Replay steps of a tape on the CPU; each storage lives from the first step that needs it to the last."""

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
    """Carry out `steps`, a plan of `tape`.

    Args:
        tape: the operations.
        steps: the plan; it is emptied on the way, so that takers and their references live no longer than needed.
        keep: called with a cell that is no longer needed and its storage, if the storage is complete and final on the
            tape; if given, generator states on the way are kept too.

    Raises:
        DeferredError: an operation's result has another layout than on the meta device.
    """
    run = _Replay(tape, keep)
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
    """Return arguments of an operator with `change(one)` in place of each instance of `kind`; lists are new."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([map_arguments(one, kind, change) for one in tree]) if type(tree) in (list, tuple) else tree
    if isinstance(tree, dict):
        return {name: map_arguments(one, kind, change) for name, one in tree.items()}
    return tree


def clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a copy of `storage`."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()


def flat_leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested lists and tuples, in order."""
    if isinstance(tree, (list, tuple)):
        return [leaf for one in tree for leaf in flat_leaves(one)]
    return [tree]


class _Replay:
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
                # After its last operation a cell is not written into any more, so no copy is needed.
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
        """Return whether a draw's target has at most one taker, of the full target, and is freed in this step."""
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
            # No value that is needed was written into the cell before.
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
        """Return the storage for the cell of `held`, whose values the operation returned as `result`."""
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
    """Return the strides that matter; those of dimensions of size 1 may differ on the meta device."""
    return [] if 0 in size else [step for count, step in zip(size, stride, strict=True) if count != 1]
