"""Process-wide torch settings that affect an operation's results, kept with each recorded operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.backends import cuda, mkldnn
from torch.utils import deterministic

Settings = tuple[Any, ...]
# The stubs lack these modules' attributes, which read and write settings.
_mkldnn: Any = mkldnn
_deterministic: Any = deterministic


def _attribute(holder: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return partial(getattr, holder, name), partial(setattr, holder, name)


# A getter and a setter for each setting. Those of `cuda` affect the CPU too.
_EVERY: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _attribute(_deterministic, "fill_uninitialized_memory"),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp),
    _attribute(_mkldnn, "enabled"),
    _attribute(_mkldnn, "deterministic"),
    *(_attribute(kind, "fp32_precision") for kind in (_mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn)),
)


def settings_now() -> Settings:
    """Return the current settings."""
    return tuple(ask() for ask, _ in _EVERY)


def set_again(settings: Settings) -> None:
    """Restore `settings`."""
    for (ask, have), value in zip(_EVERY, settings, strict=True):
        if ask() != value:
            have(value)


def fills_memory() -> bool:
    """Return whether torch fills uninitialized memory."""
    return torch.are_deterministic_algorithms_enabled() and bool(_deterministic.fill_uninitialized_memory)
