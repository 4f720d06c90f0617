"""A dispatch mode that records operations on a tape and returns tensors without values.

Operations on tensors with values only are run for real, unless they are random. If code reads a value, the operations
that lead to it are replayed.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_largescale import compat
from lightning_largescale.parallel.deferred import effects
from lightning_largescale.parallel.deferred.carry import carry_out, clone_storage, flat_leaves, map_arguments
from lightning_largescale.parallel.deferred.draws import DeferredError, Draw, Point, Stream
from lightning_largescale.parallel.deferred.settings import fills_memory, settings_now
from lightning_largescale.parallel.deferred.spans import Span
from lightning_largescale.parallel.deferred.tape import Cell, Held, Operation, Taker, Tape, read_source
from lightning_largescale.workload.tracker import writes

_aten = torch.ops.aten
_META, _CPU = torch.device("meta"), torch.device("cpu")
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
# Maximum bytes and number of values to keep, of those read and those that lead to them: otherwise a loop that reads one
# value after the other would recompute all earlier ones each time.
_KNOWN_BYTES, _KNOWN_CELLS = 2**20, 64


class Recorder(compat.DispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that run under it.

    Attributes:
        tape: the recorded operations.
        streams: streams of the generators that were drawn from, by identity; the CPU's default generator first.
        failure: why the construction cannot be deferred; it stays even if code catches the exception.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.streams = {compat.generator_key(torch.default_generator): Stream(torch.default_generator)}
        self.failure: DeferredError | None = None
        self._pauses = self._makes_meta = False
        self._known: deque[Cell] = deque()
        self._constants: dict[Any, Tensor] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Return whether `tensor` has no values yet and is on the tape."""
        with compat.without_function_modes():
            return tensor.layout is torch.strided and self.tape.cell(tensor) is not None

    def left_out(self, taken: Iterable[Tensor]) -> bool:
        """Return whether tensors without values are alive that are not among `taken`."""
        known = {id(one): one for one in (*taken, *self._constants.values())}
        users = Counter(id(one.untyped_storage()) for one in known.values() if self.holds(one))
        return any(compat.storage_users(cell.storage) > users[key] for key, cell in self.tape.cells.items())

    def refuse(self, message: str) -> DeferredError:
        """Return the exception to raise, which is the first failure; record it."""
        self.failure = self.failure or DeferredError(message)
        return self.failure

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        """Context in which code asks for meta tensors itself."""
        before, self._makes_meta = self._makes_meta, True
        try:
            yield
        finally:
            self._makes_meta = before

    def read(self, tensor: Tensor) -> Tensor:
        """Return the current values of `tensor`, which must not be written into."""
        with compat.without_dispatch_modes(), compat.without_function_modes():
            held = self.tape.held(tensor)
            known = held.cell.known
            if known is not None and known[0] == held.cell.last:
                return held.among(known[1])
            found = list[Tensor]()
            self._carry_out([(held, found.append)], [])
            return found[0]

    def write_down_whole(self, func: Any, args: Any, kwargs: Any, *, draws: bool) -> Any:
        """Record a call of `func` as one operation, although it consists of several."""
        self._pauses = True
        try:
            return self._record(func, args, kwargs, draws=draws)
        finally:
            self._pauses = False

    def assign(self, target: Tensor, source: Any) -> None:
        """Record that `source` writes its values into `target`."""
        held = self.tape.held(target.detach())
        self._append(read_source, (held, source), {}, writes=[(held.cell, held.span, held.dense)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record `func`, or run it."""
        with compat.without_function_modes():
            try:
                return self._call(func, types, args, kwargs or {})
            except DeferredError as error:
                self.failure = self.failure or error
                raise

    def _call(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._pauses:
            return func(*args, **_on(_META, kwargs))
        if self.failure is not None:
            raise self.failure
        special = any(one.__torch_dispatch__ is not Tensor.__torch_dispatch__ for one in types)
        if special or not compat.is_operator(func):
            raise DeferredError(f"{func} is called of tensors that are more than their elements, or with functions")
        given = [one for one in flat_leaves([args, list(kwargs.values())]) if isinstance(one, Tensor)]
        held = [one for one in given if self.tape.cell(one) is not None]
        strange = [one for one in given if one.is_meta and self.tape.cell(one) is None]
        if not all(map(_plain, given)):
            raise DeferredError(f"{func} is called of a tensor that is not dense on the CPU")
        if strange:
            if held or effects.lifts(func):
                raise DeferredError(f"{func} is called of tensors on the meta device that were made without values")
            return func(*args, **kwargs)
        if not given and self._makes_meta and kwargs.get("device") == _META:
            return func(*args, **kwargs)
        if given and not held:
            return self._call_real(func, args, kwargs)
        if kwargs.get("device") not in (None, _META, _CPU) or kwargs.get("pin_memory"):
            raise DeferredError(f"{func} makes a tensor that is not in the CPU's pageable memory")
        return self._call_held(func, args, kwargs)

    def _call_held(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.Tag.inplace_view in func.tags:
            return self._change_view(func, args, kwargs)
        draws = effects.draws(func)
        targets = [one for one in flat_leaves(effects.targets(func, args, kwargs)) if isinstance(one, Tensor)]
        if any(not one.is_meta for one in targets):
            if any(one.is_meta for one in targets):
                raise DeferredError(f"{func} writes into tensors with values and into others")
            return self._run_really(func, args, kwargs, draws=draws)
        stays = func is _aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype)
        if stays and kwargs.get("device") == _CPU:
            raise DeferredError("a tensor is moved to the CPU, which plainly it is on already")
        if effects.is_elsewhere_laid_out(func, args) or not (targets or compat.returns_tensors(func)):
            return self._run_really(func, args, kwargs, draws=draws, targets=targets)
        try:
            return self._record(func, args, kwargs, draws=draws)
        except NotImplementedError as error:
            if targets:
                raise DeferredError(f"{func} does not tell what it makes unless it makes it") from error
            return self._run_really(func, args, kwargs, draws=draws)

    def _call_real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call `func`, whose tensor arguments all have values."""
        draws = effects.draws(func)
        if effects.lifts(func):
            # Memory that Python shares, such as an array's, is not copied to the tape.
            return self._constant(args[0]) if args[0].untyped_storage().resizable() else func(*args, **kwargs)
        if writes(func):
            return self._run_really(func, args, kwargs, draws=draws)
        moves = func is _aten._to_copy.default and kwargs.get("device") == _META
        if moves or draws or (effects.reads_shape_only(func) and kwargs.get("device") in (None, _CPU)):
            return self._call_held(func, args, kwargs)
        return func(*args, **kwargs)

    def _change_view(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        cell = self.tape.cell(args[0])
        if cell is None and args[0].untyped_storage().nbytes() == 0:
            cell = self.tape.add_cell(args[0])
        if cell is None or cell.nbytes != cell.storage.nbytes():
            raise DeferredError(f"{func} changes the size of a tensor's storage")
        return out

    def _run_really(
        self, func: Any, args: Any, kwargs: dict[str, Any], *, draws: bool, targets: Sequence[Tensor] = ()
    ) -> Any:
        """Run `func` for real; record its results, and its writes into `targets`, as constants."""
        copies = {id(one): self._value(one).clone() for one in targets}

        def value(tensor: Tensor) -> Tensor:
            return copies[id(tensor)] if id(tensor) in copies else self._value(tensor)

        args, kwargs = (map_arguments(tree, Tensor, value) for tree in (args, kwargs))
        with compat.without_dispatch_modes():
            if not draws:
                out = func(*args, **_on(_CPU, kwargs))
            else:
                stream = self._stream(args, kwargs)
                stream.look()
                self._carry_out([], [stream.current])
                stream.resume()
                out = func(*args, **_on(_CPU, kwargs))
                stream.drawn()
        for target in targets:
            self._record(_aten.copy_.default, (target, copies[id(target)]), {}, draws=False)
        return map_arguments(out, Tensor, self._constant) if targets or not writes(func) else out

    def _carry_out(self, wanted: list[tuple[Held, Taker]], states: list[Point]) -> None:
        steps = self.tape.plan(wanted, states, whole_bytes=_KNOWN_BYTES)
        for stream in carry_out(self.tape, steps, keep=self._know).streams:
            stream.show()

    def _know(self, cell: Cell, storage: torch.UntypedStorage) -> None:
        if cell.nbytes > _KNOWN_BYTES:
            return
        cell.known = cell.last, storage
        self._known.append(cell)
        if len(self._known) > _KNOWN_CELLS:
            self._known.popleft().known = None

    def _value(self, tensor: Tensor) -> Tensor:
        return self.read(tensor) if self.tape.cell(tensor) is not None else tensor

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], *, draws: bool) -> Any:
        args, kwargs = (map_arguments(tree, Tensor, self._stand_in) for tree in (args, kwargs))
        places: dict[int, Held] = {}

        def place(tensor: Tensor) -> Held:
            # A tensor that is passed twice stays one object, since functions may compare identities.
            return places.get(id(tensor)) or places.setdefault(id(tensor), self.tape.held(tensor))

        held_args, held_kwargs = (map_arguments(tree, Tensor, place) for tree in (args, _on(_CPU, kwargs)))
        # Generators are CPU generators, so the call on the meta device goes without.
        out = func(*args, **{name: one if name != "generator" else None for name, one in _on(_META, kwargs).items()})
        made = self._made(func, out)
        targets = flat_held(effects.targets(func, held_args, held_kwargs))
        for target in targets:
            if target.cell.storage.nbytes() != target.cell.nbytes:
                raise DeferredError(f"{func} changes the size of a tensor's storage")
            if any(array() is not None for array in target.cell.arrays):
                raise DeferredError(f"{func} writes into a tensor whose values were given away as an array")
        if (made or targets) and (fills_memory() or not effects.makes_empty(func)):
            writes = [(one.cell, one.span, one.dense and effects.overwrites(func)) for one in targets]
            self._append(func, held_args, held_kwargs, writes=writes, makes=made, draws=draws)
        return out

    def _append(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        *,
        writes: list[tuple[Cell, Span, bool]] | None = None,
        makes: list[tuple[int, Held]] | None = None,
        draws: bool = False,
    ) -> None:
        sources = [] if func is read_source else effects.sources(func, args, kwargs)
        reads = [(one.cell, one.span) for one in flat_held(sources)]
        reads += [(cell, span) for cell, span, whole in writes or () if not whole]
        cells = [one.cell for one in flat_held([args, list(kwargs.values())])] + [one.cell for _, one in makes or ()]
        operation = Operation(
            func,
            args,
            kwargs,
            reads=reads,
            writes=writes or [],
            makes=makes or [],
            touches=list(dict.fromkeys(cells)),
            settings=settings_now(),
            grad=None if compat.is_operator(func) else torch.is_grad_enabled(),
        )
        if draws:
            operation.draw = Draw(self._stream(args, kwargs), len(self.tape.operations))
        self.tape.append(operation)

    def _stream(self, args: Any, kwargs: dict[str, Any]) -> Stream:
        found = [one for one in flat_leaves([args, list(kwargs.values())]) if isinstance(one, torch.Generator)]
        generator = found[0] if found else torch.default_generator
        if generator.device.type != "cpu":
            raise DeferredError(f"random numbers are asked of a generator of {generator.device}")
        if compat.generator_key(generator) not in self.streams:
            self.streams[compat.generator_key(generator)] = Stream(generator)
        return self.streams[compat.generator_key(generator)]

    def _made(self, func: Any, out: Any) -> list[tuple[int, Held]]:
        made = []
        for place, tensor in enumerate(flat_leaves(out)):
            if not isinstance(tensor, Tensor):
                continue
            if not _plain(tensor):
                raise DeferredError(f"{func} makes a tensor that is not dense")
            if self.tape.cell(tensor) is None:
                self.tape.add_cell(tensor)
                made.append((place, self.tape.held(tensor)))
        return made

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Return `tensor` if it is on the tape, else a constant with a copy of its values."""
        if self.tape.cell(tensor) is not None:
            return tensor
        copied = copy_as_it_lies(tensor.detach().resolve_conj().resolve_neg())
        key = (tuple(copied.shape), copied.stride(), copied.storage_offset(), copied.dtype, digest_of(copied))
        if key not in self._constants:
            self._constants[key] = self._constant(copied)
        return self._constants[key]

    def _constant(self, tensor: Tensor) -> Tensor:
        """Add a constant with the values of `tensor`, which must not be written into any more; return its stand-in."""
        if not _plain(tensor) or tensor.is_conj() or tensor.is_neg():
            raise DeferredError("a constant is not dense")
        storage = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=_META).untyped_storage()
        held = Held(
            Cell(storage, -1),
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            False,
            False,
            False,
        )
        stand_in = held.among(storage)
        self.tape.add_cell(stand_in)
        self._append(copy_as_it_lies, (tensor.detach(),), {}, makes=[(0, self.tape.held(stand_in))])
        return stand_in


def copy_as_it_lies(tensor: Tensor) -> Tensor:
    """Copy `tensor` with its strides, offset and full storage."""
    copied = torch.empty(0, dtype=tensor.dtype)
    return copied.set_(clone_storage(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride())


def digest_of(tensor: Tensor) -> str:
    """Return a digest of the bytes in the storage of `tensor`."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return hashlib.blake2b(content.numpy().data).hexdigest()


def flat_held(tree: Any) -> list[Held]:
    """Return the `Held` instances in nested arguments."""
    return [one for one in flat_leaves(tree) if isinstance(one, Held)]


def _on(device: torch.device, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": device} if "device" in kwargs else kwargs


def _plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "meta")
        and not (tensor.is_nested or tensor.dtype in _QUANTIZED or compat.is_transformed(tensor))
    )
