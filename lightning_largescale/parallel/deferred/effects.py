"""The reads, writes and layouts of operators that their schemas do not state."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_largescale import compat
from lightning_largescale.workload.tracker import written

_aten = torch.ops.aten
_DRAWS = ("normal_", "uniform_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_", "bernoulli_")
_FILLS = frozenset(("zero_", "fill_", "copy_", *_DRAWS))
_EMPTY = frozenset(["empty", "empty_strided", "empty_permuted", "empty_like", "new_empty", "new_empty_strided"])
_LIKE = _EMPTY.union(
    ["zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"],
    ["new_zeros", "new_ones", "new_full"],
)
# Operators whose results on the meta device have another layout than on the CPU, or are not quantized.
_QUANTIZES = (_aten.quantize_per_tensor, _aten.quantize_per_tensor_dynamic, _aten.quantize_per_channel)
_OTHERWISE_LAID_OUT = (_aten._linalg_svd, _aten.linalg_eig, _aten._fft_r2c, _aten._fft_c2r, _aten.max_unpool2d)
_OTHER_LAYOUT = frozenset(packet.default for packet in (*_OTHERWISE_LAID_OUT, _aten.nonzero_static, *_QUANTIZES))
# The same if an input is in channels-last format.
_OTHER_LAYOUT_OF_CHANNELS_LAST = frozenset(
    {_aten.convolution.default, _aten.native_batch_norm.default, _aten._native_batch_norm_legit.default}
)
_LIFTS = frozenset({_aten.lift_fresh.default, _aten.lift.default})


def makes_empty(func: Any) -> bool:
    """Return whether an operator returns uninitialized memory."""
    return _name(func) in _EMPTY


def reads_shape_only(func: Any) -> bool:
    """Return whether an operator uses its first tensor as a template, without reading its elements."""
    return _name(func) in _LIKE


def lifts(func: Any) -> bool:
    """Return whether an operator lifts a tensor that was made from Python numbers or arrays."""
    return func in _LIFTS


def is_elsewhere_laid_out(func: Any, args: Any) -> bool:
    """Return whether the result of a call has, or may have, another layout on the CPU than on the meta device."""
    if func in _OTHER_LAYOUT_OF_CHANNELS_LAST:
        return any(isinstance(one, Tensor) and not one.is_contiguous() for one in args[:2])
    return func in _OTHER_LAYOUT


def draws(func: Any) -> bool:
    """Return whether an operator may draw random numbers from a generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


def overwrites(func: Any) -> bool:
    """Return whether an operator overwrites its targets completely and without reading them."""
    return _name(func) in _FILLS or bool(_outs(func))


def targets(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that a call writes into."""
    if not compat.is_operator(func):
        return []
    if func is _aten.native_batch_norm.default:
        # Its schema does not state that it updates the running statistics.
        return [one for one in args[3:5] if one is not None] if args[5] else []
    return written(func, args, kwargs)


def sources(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments whose elements a call reads, including those that it updates."""
    fills = _name(func) in _FILLS or reads_shape_only(func)
    return [args[1:] if fills else args, [one for name, one in kwargs.items() if name not in _outs(func)]]


def _name(func: Any) -> str:
    aten = compat.is_operator(func) and func.namespace == "aten"
    return str(func.overloadpacket.__name__) if aten else ""


@functools.cache
def _outs(func: Any) -> frozenset[str]:
    """Return the names of an operator's `out` arguments."""
    names = compat.mutated_arguments(func) if compat.is_operator(func) else ()
    return frozenset(name for name in names if isinstance(name, str))
