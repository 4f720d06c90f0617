"""torch.cuda, as the pretended device answers for it: the public functions below take the places of torch.cuda's."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import torch

_device: Any = None  # the extension
_count = 0


class _Process:
    """What a fork inherits: a process whose parent has begun with CUDA cannot."""

    initialized = False
    forked = False

    @classmethod
    def after_fork(cls) -> None:
        cls.forked = cls.initialized or bool(_device.contexts())
        _device.forget_beginning()


def _index(one: Any = None) -> int:
    if one is None or (isinstance(one, int) and one < 0):
        return int(_device.current_device())
    if isinstance(one, int):
        return one
    index = torch.device(one).index
    return int(_device.current_device()) if index is None else index


def _initializes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _lazy_init()
        return function(*args, **kwargs)

    return call


def _lazy_init() -> None:
    if _Process.forked:
        raise RuntimeError(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn'"
            " start method"
        )
    # torch.utils.checkpoint asks for it by that name.
    _Process.initialized = torch.cuda._initialized = True


init = _lazy_init


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return (_Process.initialized or bool(_device.contexts())) and not _Process.forked


def _is_in_bad_fork() -> bool:
    return _Process.forked


def _is_compiled() -> bool:
    return True


def device_count() -> int:
    return _count


# --- the current device


@_initializes
def current_device() -> int:
    return int(_device.current_device())


@_initializes
def set_device(one: Any) -> None:
    _device.set_device(_index(one))


_set_device = set_device


def _exchange_device(one: int) -> int:
    before = int(_device.current_device())
    if one >= 0:
        _device.set_device(one)
    return before


def _maybe_exchange_device(one: int) -> int:
    # torch.compile tells the two apart.
    return _exchange_device(one)


class device:
    def __init__(self, one: Any) -> None:
        self.idx = -1 if one is None else _index(one)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = _exchange_device(self.idx)

    def __exit__(self, *_: object) -> None:
        _exchange_device(self.prev_idx)


@_initializes
def synchronize(one: Any = None) -> None:
    _device.synchronize(_index(one))


# --- streams and events


class Stream(torch.Stream):
    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
        if "stream_id" in kwargs:
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device=torch.device("cuda", _index(device)), priority=priority)

    @property
    def cuda_stream(self) -> int:
        return int(self.stream_id)

    def wait_stream(self, stream: Any) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Any = None) -> Any:
        event = Event() if event is None else event
        event.record(self)
        return event


class Event(torch.Event):
    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> Any:
        return super().__new__(cls, device="cuda", enable_timing=enable_timing, blocking=blocking)

    def record(self, stream: Any = None) -> Any:
        super().record(current_stream() if stream is None else stream)
        return self

    def wait(self, stream: Any = None) -> None:
        super().wait(current_stream() if stream is None else stream)

    def elapsed_time(self, other: Any) -> float:
        return 1.0


@_initializes
def current_stream(one: Any = None) -> Any:
    index = _index(one)
    return Stream(stream_id=_device.current_stream(index), device_index=index, device_type=1)


@_initializes
def default_stream(one: Any = None) -> Any:
    return Stream(stream_id=0, device_index=_index(one), device_type=1)


def set_stream(stream: Any) -> None:
    if stream is not None:
        torch._C._accelerator_setStream(stream)


class StreamContext:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self._before = int(_device.current_device()), current_stream(self.stream.device_index)
            _device.set_device(self.stream.device_index)
            set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            index, there = self._before
            set_stream(there)
            _device.set_device(index)


def stream(one: Any) -> StreamContext:
    return StreamContext(one)


def is_current_stream_capturing() -> bool:
    return False


# --- memory


# Of each device, the share of its memory that this process's allocator may take, and that memory.
_allowed: dict[int, tuple[float, int]] = {}


def _memory_of(index: int) -> int:
    return _allowed[index][1] if index in _allowed else int(_device.stats(index)["limit"])


@_initializes
def mem_get_info(one: Any = None) -> tuple[int, int]:
    own, total = _device.stats(_index(one)), _memory_of(_index(one))
    return total - own["context"] - own["reserved"], total


@_initializes
def set_per_process_memory_fraction(fraction: float, one: Any = None) -> None:
    index = _index(one)
    total = _memory_of(index)
    _allowed[index] = fraction, total
    # The extension's limit holds the context too.
    _device.set_limit(index, min(total, _device.stats(index)["context"] + int(fraction * total)))


def get_per_process_memory_fraction(one: Any = None) -> float:
    return _allowed.get(_index(one), (1.0, 0))[0]


def memory_allocated(one: Any = None) -> int:
    return int(_device.stats(_index(one))["allocated"])


def max_memory_allocated(one: Any = None) -> int:
    return int(_device.stats(_index(one))["peak"])


def memory_reserved(one: Any = None) -> int:
    return int(_device.stats(_index(one))["reserved"])


def max_memory_reserved(one: Any = None) -> int:
    return int(_device.stats(_index(one))["peak_reserved"])


def memory_stats(one: Any = None) -> dict[str, int]:
    own = _device.stats(_index(one))
    return {
        "allocated_bytes.all.current": own["allocated"],
        "allocated_bytes.all.peak": own["peak"],
        "reserved_bytes.all.current": own["reserved"],
        "reserved_bytes.all.peak": own["peak_reserved"],
        "allocation.all.allocated": own["allocations"],
        "num_ooms": 0,
        "num_alloc_retries": 0,
    }


memory_stats_as_nested_dict = memory_stats


def host_memory_stats() -> dict[str, int]:
    now, peak = _device.pinned_bytes()
    return {"allocated_bytes.current": now, "allocated_bytes.peak": peak}


def reset_peak_host_memory_stats() -> None:
    _device.reset_pinned_peak()


def reset_peak_memory_stats(one: Any = None) -> None:
    _device.reset_peak(_index(one))


def reset_accumulated_memory_stats(one: Any = None) -> None:
    pass


def empty_cache() -> None:
    for index in range(_count):
        _device.empty_cache(index)


def ipc_collect() -> None:
    pass


def get_allocator_backend() -> str:
    return "native"


# --- what kind of a device


@_initializes
def get_device_name(one: Any = None) -> str:
    return "Pretended H100"


@_initializes
def get_device_capability(one: Any = None) -> tuple[int, int]:
    return 9, 0


@_initializes
def get_device_properties(one: Any = None) -> types.SimpleNamespace:
    index = _index(one)
    return types.SimpleNamespace(
        name=get_device_name(index),
        total_memory=_memory_of(index),
        major=9,
        minor=0,
        multi_processor_count=132,
        uuid=f"pretended-{index}",
        warp_size=32,
        gcnArchName="",
        max_threads_per_multi_processor=2048,
        L2_cache_size=50 << 20,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448,
        is_integrated=False,
        is_multi_gpu_board=False,
    )


def is_bf16_supported(*_: Any, **__: Any) -> bool:
    return True


def can_device_access_peer(one: Any, other: Any) -> bool:
    return True


@_initializes
def cudart() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        cudaError=types.SimpleNamespace(success=0),
        cudaHostRegister=lambda address, nbytes, flags: _device.pin(address, nbytes) or 0,
        cudaHostUnregister=lambda address: _device.unpin(address) or 0,
        cudaMemGetInfo=mem_get_info,
    )


def check_error(code: int) -> None:
    pass


# --- random numbers


def _generator(one: Any = None) -> torch.Generator:
    return _device.default_generator(_index(one))


@_initializes
def get_rng_state(one: Any = "cuda") -> torch.Tensor:
    return _generator(one).get_state()


@_initializes
def set_rng_state(state: torch.Tensor, one: Any = "cuda") -> None:
    _generator(one).set_state(state)


@_initializes
def get_rng_state_all() -> list[torch.Tensor]:
    return [_generator(index).get_state() for index in range(_count)]


@_initializes
def set_rng_state_all(states: list[torch.Tensor]) -> None:
    for index, state in enumerate(states):
        _generator(index).set_state(state)


def manual_seed(seed: int) -> None:
    _generator().manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(_count):
        _generator(index).manual_seed(seed)


def initial_seed() -> int:
    return _generator().initial_seed()


def seed() -> int:
    return _generator().seed()


def seed_all() -> None:
    for index in range(_count):
        _generator(index).seed()


# --- in the place of torch's

_OWN = {"install"}
_PRIVATE = {
    "_exchange_device",
    "_is_compiled",
    "_is_in_bad_fork",
    "_lazy_init",
    "_maybe_exchange_device",
    "_set_device",
}


def install(extension: Any, devices: int) -> None:
    """Have torch.cuda be this module, of so many devices."""
    global _device, _count
    _device, _count = extension, devices
    os.register_at_fork(after_in_child=_Process.after_fork)
    torch.cuda._initialized = False
    torch._C._cuda_isInBadFork = False
    own = {name: one for name, one in globals().items() if getattr(one, "__module__", None) == __name__}
    own = {name: one for name, one in own.items() if name in _PRIVATE or not name.startswith("_")}
    own["default_generators"] = tuple(_generator(index) for index in range(devices))
    modules = [torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs]
    for name, value in own.items():
        for module in modules:
            if name not in _OWN and (module is torch.cuda or hasattr(module, name)):
                setattr(module, name, value)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    torch._C._cuda_getCurrentRawStream = lambda index: _device.current_stream(index)
    torch._C._cuda_getDeviceCount = device_count
    torch._C._cuda_isCurrentStreamCapturing = is_current_stream_capturing
    _install_storages()


def _install_storages() -> None:
    """A CPU build has no CUDA storages of its own: they are made, and made larger, through tensors."""
    resized, made = torch.UntypedStorage.resize_, torch.UntypedStorage.__new__

    def resize_(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resized(self, size)
        _device.resize_storage(torch.empty(0, dtype=torch.uint8, device=self.device).set_(self, 0, (0,), (1,)), size)
        return self

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        place = kwargs.get("device")
        if place is None or torch.device(place).type != "cuda":
            return made(cls, *args, **kwargs)
        return torch.empty(int(args[0]) if args else 0, dtype=torch.uint8, device=place).untyped_storage()

    torch.UntypedStorage.resize_ = resize_
    torch.UntypedStorage.__new__ = staticmethod(new)
