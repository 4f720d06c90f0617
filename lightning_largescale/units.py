"""Bytes, seconds and FLOP/s as people write and read them."""

from __future__ import annotations

import math
import re

from lightning_largescale.errors import PlanError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?\s*", re.IGNORECASE)


def parse_bytes(size: int | float | str, *, name: str = "size") -> int:
    """Bytes of a size given as a number or as text such as `"6GiB"`, `"512 MB"` or `"1.5 GB"`.

    Args:
        size: bytes, or digits with an optional unit: K, M, G, T, P are powers of 1000, Ki, Mi, Gi, Ti, Pi of 1024; a
            final B is optional.
        name: the argument named in the error.

    Raises:
        PlanError: `size` is not of that form, or is below one byte.
    """
    value: float | None = None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match and not (match[3] and not match[2]):
            scale = (_BINARY if match[3] else _DECIMAL)[match[2].upper()]
            value = float(match[1]) * scale
    elif isinstance(size, (int, float)) and not isinstance(size, bool):
        value = float(size)
    if value is None or not 1 <= value < float("inf"):
        raise PlanError(f"{name}={size!r} is no size; give 1 byte or more, or text such as '6GiB' or '512MB'.")
    return int(value)


def format_bytes(count: float, *, up: bool = False) -> str:
    """`count` bytes in the largest binary unit that leaves at least 1, three significant digits: `"1.50 GiB"`.

    Args:
        count: bytes.
        up: never less than `count`, so that who gives what was written gives enough.
    """
    return _scaled(count, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), up=up)


def format_flops(rate: float) -> str:
    """`rate` FLOP/s with a decimal unit: `"44.0 GFLOP/s"`."""
    return _scaled(rate, 1000.0, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"))


def format_seconds(seconds: float) -> str:
    """`seconds` in the unit a person would use: `"830 us"`, `"12.3 ms"`, `"1.25 s"`, `"3 min 5 s"`."""
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return "0 s" if seconds == 0 else f"{_three_digits(seconds / 1e-6)} us"


def _scaled(value: float, base: float, names: tuple[str, ...], *, up: bool = False) -> str:
    sign, value, power = "-" if value < 0 else "", abs(value), 0
    while value >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return f"{sign}{int(value) if names[power] == 'B' else _three_digits(value, up=up)} {names[power]}"


def _three_digits(value: float, *, up: bool = False) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    if up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f}"
