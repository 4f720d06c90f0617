"""Private APIs of random number generators: identity, and the layout of a state."""

from __future__ import annotations

from typing import Any

import torch


def generator_key(generator: Any) -> int:
    """Return an id of a generator while it lives; operators receive a new Python object for it each time.

    Replaced by `==` of generators, if it compared them.
    """
    return int(generator._cdata)


# Layout of the state of a CPU generator: seed, two counters and a position, then the numbers of the Mersenne twister,
# of four bytes each in eight.
_TWISTER_START, _TWISTER_BYTES = 24, 624 * 8
_MARK = b"largescale recording"


def marked_state(state: Any, number: int) -> Any:
    """Return a state of a CPU generator that encodes `number` and has the seed of `state`; its draws are not random.

    Replaced by a way to intercept draws from a generator, and reads and writes of its seed and state.
    """
    start, end = _TWISTER_START, _TWISTER_START + _TWISTER_BYTES
    content = bytearray(state.numpy().tobytes())
    mark = _MARK + number.to_bytes(8, "little")
    spread = b"".join(mark[place : place + 4] + bytes(4) for place in range(0, len(mark), 4))
    content[start:end] = spread.ljust(_TWISTER_BYTES, b"\0")
    return torch.frombuffer(content, dtype=torch.uint8)


def mark_of(state: Any) -> int | None:
    """Return the number that `marked_state` encoded in a state; None if there is none.

    Replaced with `marked_state`.
    """
    spread = state[_TWISTER_START : _TWISTER_START + 2 * len(_MARK) + 16].numpy().tobytes()
    mark = b"".join(spread[place : place + 4] for place in range(0, len(spread), 8))
    return int.from_bytes(mark[len(_MARK) :], "little") if mark.startswith(_MARK) else None
