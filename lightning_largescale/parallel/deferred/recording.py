"""Exact initialization of a model that is never held in full.

The code that builds a model runs once and allocates nothing. Its operations are recorded and replayed later in the same
order, so that random numbers equal those of a plain construction on the CPU, bit for bit. The replay frees each tensor
once it is taken.

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

# The recording that is under way.
_active: Recording | None = None


def active_recording() -> Recording | None:
    """Return the recording that is under way; None if there is none."""
    return _active


class Source(Protocol):
    """A source of values, such as a slice of a file."""

    def read(self, out: Tensor) -> None:
        """Write the values into `out`, a CPU tensor of the shape and dtype of the tensor that the source is for."""


class Recording:
    """A construction that is recorded and replayed later, tensor by tensor.

    The values, and the final state of the CPU's random number generator, equal those of running the same code plainly
    on the CPU. Tensors that the code makes appear as CPU tensors and have no values; values that it reads are computed
    immediately. Tensors that have values from the start, such as those from arrays, keep them, and so do their copies.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        """Context in which calls are recorded; it can be entered again later, by code that changes the module.

        Raises:
            DeferredError: the code cannot be deferred exactly, or fails; a plain construction shows which.
            RuntimeError: this or another recording is under way already; that one then raises a DeferredError, since
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
        """Return whether `tensor` was made while recording and has no values yet."""
        return self._recorder is not None and self._recorder.holds(tensor)

    @property
    def random_state(self) -> Tensor:
        """The state of the CPU's generator at the start of the recording, from which draws are made.

        If another state is set, such as rank 0's, a replay leaves the generator as it was.

        Raises:
            DeferredError: another state is set, but values that depend on this one were read already.
        """
        return self._made().streams[compat.generator_key(torch.default_generator)].first_state.clone()

    @random_state.setter
    def random_state(self, state: Tensor) -> None:
        self._made().streams[compat.generator_key(torch.default_generator)].first_state = state

    def assign(self, target: Tensor, source: Source) -> None:
        """Record that `target`, which has no values yet, takes its values from `source`."""
        if not self.holds(target):
            raise ValueError("target has values already; assign to a tensor that was made while recording")
        self._made().assign(target, source)

    def left_out(self, taken: Sequence[Tensor]) -> bool:
        """Return whether code keeps recorded tensors other than those `taken`; these would get no values.

        Sets, closures, caches, objects other than modules, and gradients of parameters may hold them. Tensors that
        share the memory of taken ones count too. Call this after `record()` has ended and the code under it returned.
        """
        recorder = self._made()
        if not recorder.left_out(taken):
            return False
        # They may be in an unreachable reference cycle only.
        gc.collect()
        return recorder.left_out(taken)

    def replay(self, takers: Sequence[tuple[Tensor, Callable[[Any], None]]], *, random: bool = True) -> None:
        """Compute the values of tensors, in the order in which they become final, and pass them to the takers.

        Args:
            takers: pairs of a tensor without values and a function that is called once with its values. These are a
                CPU tensor of its shape, strides and dtype, which must not be written into and is freed unless kept; or
                the unread source, if one was assigned last; or a source for a large draw, which must be read at most
                once and during the call.
            random: whether to make all draws and leave generators as the plain construction does; generators whose
                state is no longer the one at the start of the recording keep it. If False, only the draws that the
                values need are made, and generators are restored.

        Raises:
            DeferredError: an operation's result has another layout on the CPU than on the meta device.
            ValueError: a tensor has values already.
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
        """Return a digest of the operations, shapes, numbers and constants, independent of the seed."""
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
    """Refuse modules that compute differently under a function mode: those with a fast path in evaluation."""

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
    """Refuse operations on recorded tensors in threads started within, since modes are thread-local."""
    mode = Elsewhere(recorder)
    start = threading.Thread.start

    def start_under_mode(thread: threading.Thread) -> None:
        # Set on the instance, so that it applies even if the class overrides `run`.
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
    """Make Python modules that are imported within create their tensors for real, since they outlive the recording."""
    execute = SourceFileLoader.exec_module

    def execute_aside(loader: SourceFileLoader, module: ModuleType) -> None:
        with compat.without_dispatch_modes(), compat.without_function_modes():
            execute(loader, module)

    with compat.without_dispatch_modes():
        # Its first entry imports modules, which must not happen within `execute_aside`.
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
    """Return a description of `leaf` that is equal in equal recordings."""
    if isinstance(leaf, Held):
        return f"{leaf.cell.number} {leaf.cell.nbytes} {leaf.layout}"
    if hasattr(leaf, "read"):
        # A source, whose values are equal on all ranks.
        return f"source {getattr(leaf, 'shape', None)} {getattr(leaf, 'dtype', None)}"
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype} {digest_of(leaf)}"
    if isinstance(leaf, torch.Generator):
        return f"generator {streams.get(compat.generator_key(leaf))}"
    if isinstance(leaf, Draw):
        root = leaf.before.root
        # The first state of the CPU's default generator may differ between ranks.
        seeded = root is not leaf.stream.points[0] or streams[compat.generator_key(leaf.stream.generator)] > 0
        state = digest_of(root.state) if seeded and root.state is not None else ""
        return f"{streams[compat.generator_key(leaf.stream.generator)]} {leaf.before.number} {state}"
    simple = (int, float, complex, str, bool, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return repr(leaf) if leaf is None or isinstance(leaf, simple) else type(leaf).__name__
