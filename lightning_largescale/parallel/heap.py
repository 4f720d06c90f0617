"""What a step frees on the CPU goes back to the system, under plans that are there to save memory.

A step leaves holes in glibc's heap, and how many depends on the sizes of a model's tensors and on glibc's version.
`HeapWatch` gives them back when a process outgrows what it needs, or was planned to have: a step is slowed down by the
holes that it does leave and fills again. Under the plain plan most models leave none too many; convolutions on large
images do.

A sharded step allocates and frees whole blocks all the time. glibc's malloc serves up to 32 MB from its heap once such
a size was freed, and memory aligned as torch wants it seldom fits the hole that its like left. On 2 ranks with 6 blocks
of 18 MB each (glibc 2.36) a rank grew by 0.8 to 1.0 GB in a step of 0.3 GB of live tensors: sharding took more than it
saved. Memory above a fixed limit is mapped and unmapped instead: 0.34 to 0.45 GB in the same runs. It costs faults,
there 1.4 to 1.6 times the step's time where it moves memory more than it computes. Above 32 MB glibc maps anyway.

Source: man page mallopt(3), M_MMAP_THRESHOLD; glibc bug 14581 (memalign).
"""

from __future__ import annotations

import ctypes
import threading
from time import perf_counter

from lightning_largescale.hardware.usage import held_bytes, trim_heap

_M_MMAP_THRESHOLD = -3
# Below this a mapping costs more than the hole it avoids.
_SMALLEST_BYTES = 2**20
# What is held may be above what is needed by this share of it.
_SLACK = 0.02
# A process fills fresh memory at no more than this (bytes/s); it is looked at more often the nearer it may be.
_GROWTH, _SHORTEST_SECONDS, _LONGEST_SECONDS = 4 * 2**30, 0.005, 0.5
# Of the time of trimming, how long to leave the heap alone after it.
_PAUSE = 3.0


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


class HeapWatch:
    """Gives the holes in the heap back to the system whenever the process holds more than a limit.

    Where it holds more although it was just trimmed, that is what it needs, and the limit rises a little above that.

    Args:
        limit_bytes: resident memory up to which holes may stay; 0 where only a step can tell what it needs.

    Source: man page malloc_trim(3).
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self._limit = limit_bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightning_largescale heap watch", daemon=True)

    def look(self) -> float:
        """Trim if it is due; returns after how many seconds to look again."""
        pause = 0.0
        if held_bytes("cpu") > self._limit:
            began = perf_counter()
            trim_heap()
            pause = _PAUSE * (perf_counter() - began)
            self._limit = max(self._limit, int((1 + _SLACK) * held_bytes("cpu")))
        until_full = (self._limit - held_bytes("cpu")) / _GROWTH
        return max(pause, min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, until_full)))

    def start(self) -> None:
        """Look at the process from a thread, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.look()):
            pass
