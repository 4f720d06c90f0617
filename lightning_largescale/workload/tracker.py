"""A dispatch mode that counts live bytes, saved bytes and FLOPs of whatever runs under it, on fake or on real tensors.

A storage counts once, from the operation that made it until it is freed, however many tensors view it. Storages that no
operation made (parameters, buffers, the batch, constants) never count.

Source: torch.distributed._tools.mem_tracker, for storages followed by weak references.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_largescale import compat
from lightning_largescale.workload.batch import tensor_bytes
from lightning_largescale.workload.flops import count_flops, is_product
from lightning_largescale.workload.reads import Reads, storage_keys
from lightning_largescale.workload.segments import SegmentLog
from lightning_largescale.workload.workload import LARGE_BYTES

_aten = torch.ops.aten
# Returns its input, a tensor made of a Python constant: the step made it, so it counts.
_MAKES_ITS_INPUT = frozenset({_aten.lift_fresh.default})
# Kernels that keep a workspace for backward, which their fakes leave out.
_HIDES_ITS_WORKSPACE = frozenset({_aten.mkldnn_rnn_layer.default, _aten._cudnn_rnn.default})


class CannotTraceError(RuntimeError):
    """An operation that must not, or cannot, run in a trace."""


class _Storage:
    """The record of one live storage."""

    __slots__ = ("bytes", "copied", "entered", "reference", "saved")

    def __init__(self, size: int, reference: weakref.ref[Any]) -> None:
        self.bytes = size
        self.copied = False
        self.reference = reference
        self.saved = False
        self.entered = False


class Tracker(compat.DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes and FLOPs of the operations that run under it, by segment.

    Args:
        to_fake: makes a fake of a tensor from outside the step; None if the step runs on real tensors.
        value: the number that a step reads off a floating-point fake.
    """

    def __init__(self, *, to_fake: Callable[[torch.Tensor], torch.Tensor] | None = None, value: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = SegmentLog()
        self.reads = Reads({}, {})
        self.live = 0
        self.copies = 0
        self.peak = 0
        self.moved = 0
        self.values_read = False
        self.largest_temporary = 0
        self.used: set[int] = set()
        self.overwritten: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._to_fake, self._value = to_fake, value
        self._storages: dict[int, _Storage] = {}
        self._outside: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gathered: set[int] = set()

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count the storages of `tensors`."""
        for tensor in tensors:
            self._note(tensor, counts=False)

    def tell_copies_of(self, parameters: Iterable[torch.Tensor]) -> None:
        """Also count separately the copies that casts make of `parameters`, which must be left out and stay alive."""
        self._gathered = {key for parameter in parameters for key in storage_keys(parameter)}

    def follow(self, reads: Reads) -> None:
        """Notify `reads` of the inputs of operations."""
        self.reads = reads

    def storage_bytes(self, tensors: Iterable[torch.Tensor]) -> int:
        """Return the bytes of the counted storages of `tensors`, each storage once."""
        found = {id(known): known for tensor in tensors for known in self._known(tensor)}
        return sum(storage.bytes for storage in found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and count it."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            raise CannotTraceError(f"{func} talks to other processes, which do not take part in a trace")
        if func in _HIDES_ITS_WORKSPACE and self._to_fake is not None and torch.is_grad_enabled():
            raise CannotTraceError(f"{func} keeps a workspace for backward, of a size that fakes do not know")
        phase = self.log.phase(self.live, self.live - self.copies)
        if func is _aten._local_scalar_dense.default:
            return self._read_value(func, args[0])
        if func in _MAKES_ITS_INPUT:
            out = func(*args, **kwargs)
            self._note(out, counts=True)
            return out
        if self._to_fake is not None:
            args, kwargs = self._faked(args), self._faked(kwargs)
        else:
            self._keep_originals(func, args, kwargs)
        inputs = list(_tensors((args, kwargs)))
        for tensor in inputs:
            self._note(tensor, counts=False)
        out = func(*args, **kwargs)
        self.reads.see(inputs, _tensors(written(func, args, kwargs)), in_backward=self.log.in_backward)
        outputs = list(_tensors(out))
        made = [tensor for tensor in outputs if self._note(tensor, counts=True)]
        copies = func is _aten._to_copy.default and not self._gathered.isdisjoint(storage_keys(inputs[0]))
        if copies:
            self._mark_copy(outputs[0])
        self.peak = max(self.peak, self.live)
        phase.reach(self.live, self.live - self.copies)
        if made or writes(func):
            moved = sum(map(tensor_bytes, (*inputs, *outputs)))
            self.moved += moved
            phase.moved += moved
            phase.large += sum(size for size in map(tensor_bytes, made) if size >= LARGE_BYTES)
            phase.moved_copies += moved if copies else 0
            phase.flops += count_flops(func, args, kwargs, out)
            if is_product(func):
                phase.products += sum(map(tensor_bytes, made))
                phase.moved_products += moved
        return out

    @contextmanager
    def watching(
        self, blocks: Mapping[str, nn.Module], parameters: Iterable[nn.Parameter], *, saved: bool = True
    ) -> Iterator[None]:
        """Context in which the step runs: operations are counted; blocks, gradients and saved tensors are watched.

        Args:
            blocks: the blocks by name; their forwards are segments of their own.
            parameters: the parameters; their gradients count until they are in `.grad`.
            saved: watch what autograd saves; functorch's transforms do not allow it.
        """
        with ExitStack() as stack:
            for name, block in blocks.items():
                enter = block.register_forward_pre_hook(functools.partial(self._enter, name), with_kwargs=True)
                leave = block.register_forward_hook(self._leave, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            for parameter in parameters:
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
                    stack.callback(hook.remove)
            stack.enter_context(self.reads.watching(self.log))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if saved:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._saved, _same))
            stack.enter_context(self)
            yield

    def finish(self) -> None:
        """Close the last segment; a storage that is still live counts as a temporary unless it was saved."""
        self.log.close(self.live, self.live - self.copies)
        for storage in self._storages.values():
            self._temporary(storage)

    def put_back(self) -> None:
        """Restore the tensors from outside the step that it overwrote."""
        with torch.no_grad():
            for tensor, before in self.overwritten.values():
                tensor.copy_(before)
        self.overwritten.clear()

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> bool:
        """Track the storages of `tensor` that are new, and return whether there are any."""
        new = False
        for part in compat.dense_parts(tensor):
            storage = part.untyped_storage()
            key = id(storage)
            if key not in self._storages:
                size = storage.nbytes() if counts else 0
                self._storages[key] = _Storage(size, weakref.ref(storage, functools.partial(self._freed, key)))
                self.live += size
                new = True
        return new

    def _known(self, tensor: torch.Tensor) -> list[_Storage]:
        """Return the records of the storages of `tensor`."""
        return [self._storages[key] for key in storage_keys(tensor) if key in self._storages]

    def _mark_copy(self, tensor: torch.Tensor) -> None:
        for storage in self._known(tensor):
            storage.copied = True
            self.copies += storage.bytes

    def _freed(self, key: int, _: Any) -> None:
        storage = self._storages.pop(key)
        self.live -= storage.bytes
        self.copies -= storage.bytes if storage.copied else 0
        self._temporary(storage)

    def _temporary(self, storage: _Storage) -> None:
        if not storage.saved:
            self.largest_temporary = max(self.largest_temporary, storage.bytes)

    def _accumulated(self, parameter: torch.Tensor) -> None:
        known = [] if parameter.grad is None else self._known(parameter.grad)
        if id(parameter) not in self.used:
            self.used.add(id(parameter))
            self.log.complete(id(parameter), sum(storage.bytes for storage in known))
        for storage in known:
            self._temporary(storage)
            self.live -= storage.bytes
            storage.bytes = 0

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        if compat.current_node_sequence() is None:
            for storage in self._known(tensor):
                if storage.bytes and not storage.saved:
                    storage.saved = True
                    segment = self.log.current()
                    segment.saved += storage.bytes
                    segment.saved_copies += storage.bytes if storage.copied else 0
        # Detached, since an operation's own output and its node would otherwise keep each other alive.
        return tensor.detach()

    def _enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.log.enter_block(name)
        if compat.current_node_sequence() is not None:
            return
        for tensor in _tensors((args, kwargs)):
            for storage in self._known(tensor):
                if not storage.entered:
                    storage.entered = True
                    self.log.current().inputs += storage.bytes

    def _leave(self, *_: Any) -> None:
        self.log.leave_block()

    def _read_value(self, func: Any, tensor: torch.Tensor) -> Any:
        if self._to_fake is None or not compat.is_fake(tensor):
            with compat.without_dispatch_modes():
                return func(tensor)
        found = read_number(func, tensor)
        self.values_read |= found is None
        return self._value if found is None else found

    def _faked(self, tree: Any) -> Any:
        """Replace the tensors from outside the step in `tree` by fakes."""
        if isinstance(tree, torch.Tensor):
            if compat.is_fake(tree):
                return tree
            if id(tree) not in self._outside:
                # The original is kept beside its fake, so that its id is not reused.
                self._outside[id(tree)] = (tree, self._to_fake(tree))  # type: ignore[misc]
            return self._outside[id(tree)][1]
        if isinstance(tree, (list, tuple)):
            return type(tree)([self._faked(item) for item in tree])
        if isinstance(tree, dict):
            return {key: self._faked(value) for key, value in tree.items()}
        return tree

    def _keep_originals(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copy the tensors from outside the step that an operation is about to overwrite, once each."""
        changing = _tensors(written(func, args, kwargs))
        for tensor in (part for one in changing for part in compat.dense_parts(one)):
            key = id(tensor.untyped_storage())
            known = self._storages.get(key)
            if (known is None or known.bytes == 0) and key not in self.overwritten:
                whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
                self.overwritten[key] = (whole, whole.clone())


_mutated_arguments = functools.cache(compat.mutated_arguments)


def writes(func: Any) -> bool:
    """Return whether `func`, an operator, writes into its arguments."""
    return bool(_mutated_arguments(func))


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that a call of `func` writes into."""
    return [
        args[place] if isinstance(place, int) and place < len(args) else kwargs.get(place)
        for place in _mutated_arguments(func)
    ]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)


def read_number(func: Any, tensor: torch.Tensor) -> Any:
    """Return the number that `func` reads off a fake; None for a floating-point fake without a value.

    Raises:
        Exception: the fake has no value and is not floating-point, so that no other number can replace it.
    """
    try:
        return func(tensor)
    except compat.data_dependent_errors():
        if not tensor.is_floating_point():
            raise
        return None


class MadeUpNumbers(compat.DispatchMode):  # type: ignore[no-untyped-call]
    """Mode in which code that reads numbers off floating-point fakes reads 1.0."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _aten._local_scalar_dense.default or not compat.is_fake(args[0]):
            return func(*args, **(kwargs or {}))
        found = read_number(func, args[0])
        return 1.0 if found is None else found
