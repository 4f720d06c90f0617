"""What a step frees on the CPU goes back to the system, under plans that are there to save memory.

A sharded step allocates and frees whole blocks all the time. glibc's malloc serves up to 32 MB from its heap once such
a size was freed, and memory aligned as torch wants it seldom fits the hole that its like left. On 2 ranks with 6 blocks
of 18 MB each (glibc 2.36) a rank grew by 0.8 to 1.0 GB in a step of 0.3 GB of live tensors: sharding took more than it
saved. Memory above a fixed limit is mapped and unmapped instead: 0.34 to 0.45 GB in the same runs. It costs faults,
there 1.4 to 1.6 times the step's time where it moves memory more than it computes. Above 32 MB glibc maps anyway.

Source: man page mallopt(3), M_MMAP_THRESHOLD; glibc bug 14581 (memalign).
"""

from __future__ import annotations

import ctypes

from lightning_largescale.hardware.usage import held_bytes, release_free_memory

_M_MMAP_THRESHOLD = -3
# Below this a mapping costs more than the hole it avoids.
_SMALLEST_BYTES = 2**20


def map_from(smallest_bytes: int) -> None:
    """Let this process map every allocation of about `smallest_bytes` or more, from now on; nothing without glibc.

    Args:
        smallest_bytes: of the matrices that are gathered, 0 without sharding; what is smaller than half of it, or than
            1 MiB, stays in the heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    # Half, so that the shards and gradients of the smallest are mapped too.
    mallopt(_M_MMAP_THRESHOLD, max(_SMALLEST_BYTES, smallest_bytes // 2))


class HeapGuard:
    """Lets a plain run's heap be until the holes in it would make the process outgrow its plan, then maps tensors.

    How many holes a heap keeps depends on the sizes of a model's tensors and on glibc's version, and cannot be told
    before. Most models stay below; convolutions on large images do not, and pay for it with time (9% seen).

    Args:
        above_bytes: resident memory between two steps from which on the next may not stay within its plan.
    """

    def __init__(self, above_bytes: int) -> None:
        self._above_bytes, self._mapped = above_bytes, False

    def __call__(self) -> None:
        """Look; to be called between two steps."""
        if not self._mapped and held_bytes("cpu") > self._above_bytes:
            self._mapped = True
            map_from(0)
            release_free_memory()
