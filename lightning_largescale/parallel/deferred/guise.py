"""A function mode under which tensors without values appear to user code as CPU tensors.

Below torch's functions they are on the meta device. If code reads their values outside of operators, they are computed
immediately.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

from lightning_largescale import compat
from lightning_largescale.parallel.deferred.carry import flat_leaves, map_arguments
from lightning_largescale.parallel.deferred.draws import DeferredError, is_marked
from lightning_largescale.parallel.deferred.recorder import Recorder

_Handler = Callable[[Recorder, Any, Any, dict[str, Any]], Any]


class Guise(TorchFunctionMode):
    """Makes the tensors of `recorder` appear as CPU tensors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or its replacement if it behaves differently on the meta device and the CPU."""
        kwargs = kwargs or {}
        try:
            if torch.is_autocast_enabled("cpu") and _holds(self._recorder, [args, list(kwargs.values())]):
                raise DeferredError("operations run under autocast, which leaves the meta device alone")
            if any(map(is_marked, args)):
                raise DeferredError("a generator's state is looked into, which was asked for after a draw")
            return _HANDLERS.get(func, _unhandled)(self._recorder, func, args, kwargs)
        except DeferredError as error:
            raise self._recorder.refuse(str(error)) from error


class Elsewhere(TorchFunctionMode):
    """Refuses operations on tensors without values in threads other than the one that `recorder` records.

    Attributes:
        active: whether the recording is under way.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.active = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; raise if an argument is a tensor without values."""
        kwargs = kwargs or {}
        if self.active and _holds(self._recorder, [args, list(kwargs.values())]):
            raise self._recorder.refuse("another thread works on tensors that were made while recording")
        return func(*args, **kwargs)


def _holds(recorder: Recorder, tree: Any) -> bool:
    return any(isinstance(one, Tensor) and recorder.holds(one) for one in flat_leaves(tree))


def _says(answer: Any) -> _Handler:
    """Return a handler that gives `answer`, a CPU tensor's, for tensors without values."""

    def handle(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return answer if _holds(recorder, args[0]) else func(*args, **kwargs)

    return handle


def _type(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) > 1 or kwargs or not _holds(recorder, args[0]):
        return func(*args, **kwargs)
    with compat.without_dispatch_modes():
        return torch.empty(0, dtype=args[0].dtype, device="cpu").type()


def _to(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Handle `to`: a move to the CPU, where the tensor appears to be, is none; another tensor stands for its dtype."""
    tensor, others = args[0], [*args[1:], *kwargs.values()]
    held = recorder.holds(tensor)
    if not held and not _holds(recorder, others):
        return func(*args, **kwargs)

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        if held and isinstance(value, (str, torch.device)):
            if torch.device(value).type != "cpu":
                raise DeferredError(f"a tensor is moved to {value}")
            return torch.device("meta")
        return value

    kwargs = {"dtype" if name == "other" else name: place(value) for name, value in kwargs.items()}
    return tensor.to(*map(place, args[1:]), **kwargs)


def _cpu(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not recorder.holds(args[0]):
        return func(*args, **kwargs)
    return args[0].to(**kwargs) if kwargs else args[0]


def _type_as(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, other = args[0], args[1] if len(args) > 1 else kwargs["other"]
    return tensor.to(other.dtype) if _holds(recorder, [tensor, other]) else func(*args, **kwargs)


def _read(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call `func` with real values in place of tensors without values."""
    if not _holds(recorder, [args, list(kwargs.values())]):
        return func(*args, **kwargs)

    def value(tensor: Tensor) -> Any:
        if not recorder.holds(tensor):
            return tensor
        found = recorder.read(tensor)
        return found.requires_grad_() if tensor.requires_grad else found.detach()

    def values(tree: Any) -> Any:
        return map_arguments(tree, Tensor, value)

    out = func(*values(args), **values(kwargs))
    if isinstance(out, np.ndarray) and not out.flags.owndata:
        # Writes into the array would not reach the tensor, nor the tensor's writes the array.
        out.flags.writeable = False
        recorder.tape.held(args[0]).cell.arrays.append(weakref.ref(out))
    return out


def _as_tensor(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    if isinstance(given, torch.UntypedStorage):
        # safetensors loads files so; torch does not handle storages under a dispatch mode.
        with compat.without_dispatch_modes():
            return func(*args, **kwargs)
    if not (isinstance(given, Tensor) and recorder.holds(given)):
        return _read(recorder, func, args, kwargs)
    options = {name: one for name, one in kwargs.items() if name in ("dtype", "device", "copy") and one is not None}
    return _to(recorder, Tensor.to, (given, *args[1:]), options)


def _new_tensor(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not recorder.holds(args[0]):
        return _read(recorder, func, args, kwargs)
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "cpu":
        raise DeferredError("a tensor is made on another device")
    options = {name: one for name, one in kwargs.items() if name not in ("device", "data")}
    data = args[1] if len(args) > 1 else kwargs["data"]
    return _read(recorder, torch.tensor, (data,), {"dtype": args[0].dtype, **options})


def _set_item(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Convert Python indices and values to tensors here: torch would convert them without dispatching operators."""
    tensor, index, *values = args
    if not recorder.holds(tensor):
        return func(*args, **kwargs)
    if isinstance(index, list) and not all(isinstance(one, (int, np.integer)) for one in index):
        # torch may treat it as a tuple.
        raise DeferredError("a tensor is asked for elements by a list of more than numbers")
    parts = index if isinstance(index, tuple) else (index,)
    index = tuple(_index(one) if isinstance(one, (list, tuple, range, np.ndarray)) else one for one in parts)
    values = [one if isinstance(one, Tensor) else torch.tensor(one, dtype=tensor.dtype) for one in values]
    return func(tensor, index, *values)


def _index(given: Any) -> Tensor:
    """Return listed indices as a tensor; an empty list gives an empty integer tensor, as in torch."""
    if isinstance(given, np.ndarray):
        return torch.as_tensor(given)
    found = torch.as_tensor([*given])
    return found if found.numel() else found.long()


def _new(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not recorder.holds(args[0]):
        return func(*args, **kwargs)
    if kwargs or not all(isinstance(one, (int, torch.Size)) for one in args[1:]):
        raise DeferredError("Tensor.new is called with data")
    return torch.empty(*(args[1:] or (0,)), dtype=args[0].dtype)


def _set_data(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, value = args
    if recorder.holds(tensor) == recorder.holds(value):
        return func(*args, **kwargs)
    if type(tensor) not in (Tensor, nn.Parameter):
        raise DeferredError(f"a {type(tensor).__name__} takes values of its own, or gives them up")
    # torch refuses to assign `data` across devices.
    attributes = dict(tensor.__dict__)
    other = value.detach().requires_grad_(tensor.requires_grad)
    other = other if type(tensor) is Tensor else nn.Parameter(other, tensor.requires_grad)
    try:
        swap_tensors(tensor, other)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DeferredError("a tensor in use takes values of its own, or gives them up") from error
    tensor.__dict__.update(attributes)
    return None


def _empty(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make the empty CPU tensors of torch.load for real: it sets a real storage on them."""
    if args == ((0,),) and isinstance(device := kwargs.get("device"), torch.device) and device.type == "cpu":
        with compat.without_dispatch_modes():
            return func(*args, **kwargs)
    return _unhandled(recorder, func, args, kwargs)


def _unhandled(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    if not isinstance(device, (str, torch.device)) or torch.device(device).type != "meta":
        return func(*args, **kwargs)
    with recorder.on_meta():
        return func(*args, **kwargs)


def _refuse(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _holds(recorder, args):
        raise DeferredError(f"{getattr(func, '__name__', func)} asks for the memory of a tensor")
    return func(*args, **kwargs)


def _whole(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Record `func` as one operation, since its decomposition depends on the device and on active modes."""
    given = [*args, *kwargs.values()]
    if not _holds(recorder, given):
        # Functions without draws, called with real values only, run as they do outside of the recording.
        plain = compat.without_dispatch_modes() if func in _UNDRAWN else nullcontext()
        with plain:
            return func(*args, **kwargs)
    if kwargs.get("out") is not None:
        raise DeferredError(f"{func.__name__} puts its result into a tensor")
    # Functions with dropout get its probability as a float.
    draws = func not in _UNDRAWN and any(isinstance(one, float) and one > 0 for one in given)
    with compat.without_function_modes():
        return recorder.write_down_whole(func, args, kwargs, draws=draws)


def _group_norm(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Refuse non-contiguous inputs: `group_norm` preserves channels-last format on the CPU only."""
    given = args[0] if args else kwargs["input"]
    if recorder.holds(given) and not given.is_contiguous():
        raise DeferredError("group_norm is called of a tensor that is not contiguous")
    return func(*args, **kwargs)


def _deepcopy(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copy as Tensor.__deepcopy__ does on the CPU: tensors that share a storage share its copy."""
    tensor, memo = args
    if tensor.device.type == "cpu":
        with compat.without_dispatch_modes():
            return func(*args, **kwargs)
    if type(tensor) is not Tensor or not recorder.holds(tensor) or not tensor.is_leaf or id(tensor) in memo:
        return func(*args, **kwargs)
    storages = memo.setdefault("lightning_largescale", {})
    storage = tensor.untyped_storage()
    with torch.no_grad():
        if id(storage) not in storages:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages[id(storage)] = whole.clone()
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(storages[id(storage)].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        copied = copied.conj_physical() if tensor.is_conj() else copied
        copied = copied.neg() if tensor.is_neg() else copied
    copied.requires_grad_(tensor.requires_grad)
    copied.grad = None if tensor.grad is None else _deepcopy(recorder, func, (tensor.grad, memo), {})
    copied.__dict__ = copy.deepcopy(tensor.__dict__, memo)
    memo[id(tensor)] = copied
    return copied


_READS = (
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__repr__,
    Tensor.__format__,
    torch.tensor,
)
# On the meta device all storages begin at address 0, so code that compares addresses would consider all tensors tied.
_MEMORY: tuple[Any, ...] = (Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.share_memory_)
_MEMORY += (Tensor.pin_memory, Tensor.__dlpack__, Tensor.apply_)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# matmul of batches by one matrix is one product or one per batch, depending on whether a mode is active.
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.linalg.matmul)
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
# These skip singular vectors or eigenvectors, unless the device is the meta device or a mode is active.
_SPECTRAL = (
    torch.linalg.svdvals,
    torch.linalg.eigvalsh,
    torch.linalg.cond,
    torch.linalg.matrix_rank,
    torch.linalg.matrix_norm,
    torch.linalg.norm,
    torch.norm,
    torch.nuclear_norm,
    Tensor.norm,
)
_UNDRAWN = (*_SPECTRAL, *_PRODUCTS)
_BY_DEVICE = (*_ATTENTION, *_RECURRENT, *_UNDRAWN)
_HANDLERS: dict[Any, _Handler] = {
    compat.function_getter("device"): _says(torch.device("cpu")),
    compat.function_getter("is_cpu"): _says(True),
    compat.function_getter("is_meta"): _says(False),
    compat.function_setter("data"): _set_data,
    Tensor.type: _type,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.type_as: _type_as,
    torch.as_tensor: _as_tensor,
    torch.asarray: _as_tensor,
    Tensor.new_tensor: _new_tensor,
    Tensor.new: _new,
    torch.empty: _empty,
    Tensor.__getitem__: _set_item,
    Tensor.__setitem__: _set_item,
    Tensor.__deepcopy__: _deepcopy,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    **dict.fromkeys(_READS, _read),
    **dict.fromkeys(_MEMORY, _refuse),
    Tensor.__reduce_ex__: _refuse,
    **dict.fromkeys(_BY_DEVICE, _whole),
}
