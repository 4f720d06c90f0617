"""Exact initialisation of a model that is never held whole.

The code that builds a model runs once and allocates nothing: operations are written down, and carried out later in
their order, so that random numbers are those of a plain construction on the CPU, bit for bit. A tensor has values from
the last write that matters until it is taken, and then goes.

Source: torchdistx.deferred_init, archived in 2023, which keeps a graph for each tensor, but not the order of draws.
"""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_largescale import compat
from lightning_largescale.parallel.deferred.carry import carry_out, flat_leaves
from lightning_largescale.parallel.deferred.draws import DeferredError, Draw, check_kept_states
from lightning_largescale.parallel.deferred.guise import Elsewhere, Guise
from lightning_largescale.parallel.deferred.recorder import Recorder, digest_of
from lightning_largescale.parallel.deferred.tape import Held

# That which records at this moment.
_active: Recording | None = None


def active_recording() -> Recording | None:
    """The recording that is under way; None where nothing is recorded."""
    return _active


class Source(Protocol):
    """Values that are somewhere else, such as a slice of a file."""

    def read(self, out: Tensor) -> None:
        """Write them into `out`, a tensor on the CPU of the shape and dtype of that which they were assigned to."""


class Recording:
    """A construction that is recorded, and carried out later, tensor by tensor.

    Values, and the state of the CPU's random number generator in the end, are those of running the same code plainly on
    the CPU. Tensors that the code makes look to it as on the CPU and have no values; what it reads of them is made on
    the spot. Tensors that come with values, such as those from arrays, keep them, and so do copies of those.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within, what is called is recorded; may be entered again later, by what changes a module.

        Raises:
            DeferredError: the code does what cannot be deferred exactly, or fails: the plain construction tells.
            RuntimeError: a recording is under way already, this or another; that one then raises a DeferredError, since
                the code under it fails.
        """
        global _active
        if _active is not None:
            raise RuntimeError("record() is entered already" + ("" if _active is self else " by another recording"))
        recorder = self._recorder = self._recorder or Recorder()
        for stream in recorder.streams.values():
            stream.enter()
        _active = self
        try:
            with recorder, Guise(recorder), _no_fast_path(recorder), _no_threads(recorder), _imports_aside():
                yield
        except Exception as error:
            raise recorder.failure or recorder.refuse(f"the code fails without values: {error}") from error
        finally:
            _active = None
            self._leave(recorder)
        if recorder.failure is not None:
            raise recorder.failure

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` was made while recording, so has no values yet."""
        return self._recorder is not None and self._recorder.holds(tensor)

    @property
    def random_state(self) -> Tensor:
        """The state of the CPU's generator at which recording began; draws are made from it.

        Where another one is set, such as rank 0's, a replay leaves the generator as it was.

        Raises:
            DeferredError: another one is set, and values were read that follow from this.
        """
        return self._made().streams[compat.generator_key(torch.default_generator)].first_state.clone()

    @random_state.setter
    def random_state(self, state: Tensor) -> None:
        self._made().streams[compat.generator_key(torch.default_generator)].first_state = state

    def assign(self, target: Tensor, source: Source) -> None:
        """From here on the values of `target`, which is held, are those of `source`."""
        if not self.holds(target):
            raise ValueError("target has values already; assign to a tensor that was made while recording")
        self._made().assign(target, source)

    def left_out(self, taken: Sequence[Tensor]) -> bool:
        """Whether code keeps tensors that were made while recording, and that are not `taken`: they get no values.

        Objects other than modules may have them, sets, closures and caches, or parameters as their gradients. Tensors
        count that share the memory of those taken. Call it past `record()`, once what ran there has returned.
        """
        recorder = self._made()
        if not recorder.left_out(taken):
            return False
        # Perhaps only in a cycle that nobody needs.
        gc.collect()
        return recorder.left_out(taken)

    def replay(self, takers: Sequence[tuple[Tensor, Callable[[Any], None]]], *, random: bool = True) -> None:
        """Make the values of tensors, in the order in which they are final, and hand them over.

        Args:
            takers: tensors that are held, each with what is called once with its values: a tensor on the CPU of its
                shape, strides and dtype, which is not to be written into and is freed unless kept; or the source
                itself, unread, where that is what was assigned to it last; what stands for a large draw likewise is to
                be read once, there and then.
            random: make all draws, and leave generators as the plain construction does, those whose state is no longer
                the one at which recording began left alone. If False, draws are made as far as values need them, and
                generators are put back.

        Raises:
            DeferredError: an operation makes on the CPU what it did not say it would.
            ValueError: a tensor is not held.
        """
        recorder = self._made()
        if recorder.failure is not None:
            raise recorder.failure
        if not all(self.holds(tensor) for tensor, _ in takers):
            raise ValueError("takers has a tensor that has values already; give those that were made while recording")
        with compat.without_function_modes():
            wanted = [(recorder.tape.held(tensor), taker) for tensor, taker in takers]
        streams = list(recorder.streams.values())
        before = [stream.generator.get_state() for stream in streams]
        ended = False
        try:
            steps = recorder.tape.plan(wanted, [stream.current for stream in streams] if random else [])
            carry_out(recorder.tape, steps)
            ended = True
        finally:
            for stream, state in zip(streams, before, strict=True):
                stream.finish(state, random=random and ended)

    def digest(self) -> str:
        """Equal for recordings of the same operations on the same shapes, numbers and constants, whatever the seed."""
        recorder = self._made()
        numbers = {key: number for number, key in enumerate(recorder.streams)}
        total = hashlib.blake2b()
        for operation in recorder.tape.operations:
            made = [held for _, held in operation.makes]
            parts = [operation.args, list(operation.kwargs.items()), made]
            words = [_describe(leaf, numbers) for leaf in flat_leaves(parts)]
            words += [str(operation.settings), _describe(operation.draw, numbers)]
            total.update("|".join([_function(operation.func), *words]).encode())
        return total.hexdigest()

    def _made(self) -> Recorder:
        if self._recorder is None:
            raise RuntimeError("nothing was recorded")
        return self._recorder

    @staticmethod
    def _leave(recorder: Recorder) -> None:
        for cell in recorder.tape.cells.values():
            cell.known = None
        for stream in recorder.streams.values():
            try:
                stream.leave()
            except DeferredError as error:
                recorder.refuse(str(error))
        try:
            check_kept_states(recorder.streams.values())
        except DeferredError as error:
            recorder.refuse(str(error))


@contextmanager
def _no_fast_path(recorder: Recorder) -> Iterator[None]:
    """Refuse what modules compute in another way under a function mode than without."""

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) and not module.training:
            raise recorder.refuse(f"an evaluating {type(module).__name__} computes with torch's fast path")

    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _no_threads(recorder: Recorder) -> Iterator[None]:
    """Refuse what threads that are started within do with the tensors: modes are each thread's own."""
    mode = Elsewhere(recorder)
    start = threading.Thread.start

    def start_under_mode(thread: threading.Thread) -> None:
        # Of the instance, so that it is found also where a class has a `run` of its own.
        thread.run = partial(_run_under, mode, thread.run)  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = start_under_mode  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        mode.active = False
        threading.Thread.start = start  # type: ignore[method-assign]


@contextmanager
def _imports_aside() -> Iterator[None]:
    """Have modules that are imported within make their tensors for real: they are there for all that comes later."""
    execute = SourceFileLoader.exec_module

    def execute_aside(loader: SourceFileLoader, module: ModuleType) -> None:
        with compat.without_dispatch_modes(), compat.without_function_modes():
            execute(loader, module)

    with compat.without_dispatch_modes():
        # It imports what it needs when it is entered first, which may not happen within that import.
        pass
    SourceFileLoader.exec_module = execute_aside  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SourceFileLoader.exec_module = execute  # type: ignore[method-assign]


def _run_under(mode: Elsewhere, run: Callable[[], None]) -> None:
    with mode:
        run()


def _function(function: Any) -> str:
    return str(function) if compat.is_operator(function) else str(function.__name__)


def _describe(leaf: Any, streams: dict[int, int]) -> str:
    """What is equal in equal recordings."""
    if isinstance(leaf, Held):
        return f"{leaf.cell.number} {leaf.cell.nbytes} {leaf.layout}"
    if hasattr(leaf, "read"):
        # A source, whose values are the same wherever they are read.
        return f"source {getattr(leaf, 'shape', None)} {getattr(leaf, 'dtype', None)}"
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype} {digest_of(leaf)}"
    if isinstance(leaf, torch.Generator):
        return f"generator {streams.get(compat.generator_key(leaf))}"
    if isinstance(leaf, Draw):
        root = leaf.before.root
        # Where the CPU's own generator begins is each rank's.
        seeded = root is not leaf.stream.points[0] or streams[compat.generator_key(leaf.stream.generator)] > 0
        state = digest_of(root.state) if seeded and root.state is not None else ""
        return f"{streams[compat.generator_key(leaf.stream.generator)]} {leaf.before.number} {state}"
    simple = (int, float, complex, str, bool, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return repr(leaf) if leaf is None or isinstance(leaf, simple) else type(leaf).__name__
