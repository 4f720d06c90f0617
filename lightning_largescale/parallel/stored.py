"""Tensors stored in files that are read on demand; each rank reads only its shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_largescale import compat
from lightning_largescale.dtensors import local_of
from lightning_largescale.hardware.usage import let_rest
from lightning_largescale.parallel.chunks import Chunk, chunks_of, write_part
from lightning_largescale.parallel.deferred import active_recording
from lightning_largescale.parallel.rows import global_shape

# Attribute in which a tensor on the meta device keeps the stored tensor that was copied into it.
_SOURCE = "_largescale_stored"


class Stored(Tensor):
    """A tensor in a file that acts as a CPU tensor: shape and dtype are known, values are read when needed.

    `tensor.copy_(stored)`, by which modules load a state_dict, reads only this rank's shard of `tensor`. Any other
    computation reads the full tensor.

    Args:
        shape: shape of the full tensor.
        dtype: dtype in the file.
        read: reads boxes of the tensor into the values of chunks, which may have another dtype or device.
        device: device that the tensor reports: the CPU, or the meta device for code that builds there.
    """

    _read: Callable[[Sequence[Chunk]], None]
    # The full values, once something is written into the tensor.
    _written: Tensor | None = None
    # Whether `read` was called.
    was_read = False

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, read: Callable[[Sequence[Chunk]], None], device: str = "cpu"
    ) -> Stored:
        """Create the tensor; the arguments are those of the class."""
        stored: Stored = compat.tensor_without_values(cls, tuple(shape), dtype, torch.device(device))
        stored._read = read
        return stored

    def read(self, out: Tensor) -> None:
        """Read this rank's shard into `out`, a parameter or its state.

        Raises:
            ValueError: the global shape of `out` is not the stored tensor's.
        """
        if (shape := global_shape(out)) != self.shape:
            raise ValueError(f"the stored tensor has shape {tuple(self.shape)} and {tuple(shape)} is to be read")
        self.was_read = True
        if self._written is None:
            self._read(chunks_of(out))
        else:
            write_part(out, self._written)

    def _copy_into(self, out: Tensor) -> None:
        """Read into `out`; if it has no values yet, make this tensor the source of its values."""
        recording = active_recording()
        if recording is not None and recording.holds(out):
            recording.assign(out, self)
        elif out.is_meta:
            setattr(out, _SOURCE, self)
        else:
            with torch.no_grad():
                self.read(out)
                let_rest(local_of(out))

    def whole(self) -> Tensor:
        """Return the full values as a plain tensor."""
        if self._written is not None:
            return self._written
        values = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read(values)
        return values

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Read on `copy_` into another tensor and on access to values; call other functions as for any tensor."""
        if func is Tensor.copy_ and len(args) > 1 and isinstance(args[1], Stored) and not isinstance(args[0], Stored):
            args[1]._copy_into(args[0])
            return args[0]
        if func in _READS and isinstance(args[0], Stored):
            return func(args[0].whole(), *args[1:], **(kwargs or {}))
        return compat.call_as_tensor(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute with the full values, which are kept if `func` writes into them."""
        kwargs = dict(kwargs or {})
        written = [args[key] if isinstance(key, int) else kwargs.get(key) for key in compat.mutated_arguments(func)]
        # Views that share the memory may be written into as well.
        shared = list(args) if compat.returns_views(func) else []
        for one in (*written, *shared):
            if isinstance(one, Stored):
                one._written = one.whole()
        result = func(*_whole(list(args)), **_whole(kwargs))
        changed = [one for one in written if isinstance(one, Stored)]
        return changed[0] if changed else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the full values."""
        return self.whole().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the full values."""
        return self.whole().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and dtype, without reading values."""
        return f"Stored(shape={tuple(self.shape)}, dtype={self.dtype})"


# Functions that read the values of a tensor without dispatching an operator.
_READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.cpu, Tensor.contiguous)


def stored_for(tensor: Tensor) -> Stored | None:
    """Return the stored tensor that was copied into `tensor`, which is on the meta device and in no recording."""
    return getattr(tensor, _SOURCE, None)


def forget_stored(tensor: Tensor) -> None:
    """Drop the reference of `tensor`, whose values are read, to its stored tensor."""
    vars(tensor).pop(_SOURCE, None)


def _whole(value: Any) -> Any:
    return apply_to_collection(value, Stored, Stored.whole)
