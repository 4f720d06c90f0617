"""Return of freed CPU memory to the system, under plans that save memory.

A step fragments glibc's heap; how much depends on the sizes of a model's tensors and on glibc's version. `HeapWatch`
trims the heap when a process outgrows the memory that it needs, or its planned memory; not at every step, since giving
back holes that the next step fills again slows it down. Under the plain plan most models leave few holes; convolutions
on large images leave many.

A sharded step allocates and frees full blocks all the time. glibc's malloc serves up to 32 MB from its heap once such a
size was freed, and torch's aligned allocations seldom fit the hole that an equal one left. On 2 ranks with 6 blocks of
18 MB each (glibc 2.36) a rank grew by 0.8 to 1.0 GB in a step of 0.3 GB of live tensors: sharding took more than it
saved. With allocations above a fixed limit mapped and unmapped instead, it grew by 0.34 to 0.45 GB in the same runs.
Mapping costs page faults: there 1.4 to 1.6 times the step's time if it moves memory more than it computes. Above 32 MB
glibc maps anyway.

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
# Fraction by which held memory may exceed needed memory.
_SLACK = 0.02
# Upper bound of the growth of a process (bytes/s), and of the interval between looks, shorter near the limit.
_GROWTH, _SHORTEST_SECONDS, _LONGEST_SECONDS = 4 * 2**30, 0.005, 0.5
# Pause after a trim, as a multiple of the trim's time.
_PAUSE = 3.0


def map_from(smallest_bytes: int) -> None:
    """Make malloc map every allocation of about `smallest_bytes` or more from now on; no-op without glibc.

    Args:
        smallest_bytes: Bytes of the smallest matrix that is all-gathered, 0 without sharding. Allocations below half
            of it, or below 1 MiB, stay in the heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    # Half, so that the shards and gradients of the smallest are mapped too.
    mallopt(_M_MMAP_THRESHOLD, max(_SMALLEST_BYTES, smallest_bytes // 2))


class HeapWatch:
    """Watcher that trims the heap whenever the process holds more memory than a limit.

    If the process holds more even after a trim, it needs that memory, and the limit rises to slightly above it.

    Args:
        limit_bytes: Resident memory up to which holes may stay; 0 if the need is known only once steps run.

    Source: man page malloc_trim(3).
    """

    def __init__(self, limit_bytes: int = 0) -> None:
        self._limit = limit_bytes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightning_largescale heap watch", daemon=True)

    def look(self) -> float:
        """Trim the heap if the limit is exceeded; return the seconds until the next look."""
        pause = 0.0
        if held_bytes("cpu") > self._limit:
            began = perf_counter()
            trim_heap()
            pause = _PAUSE * (perf_counter() - began)
            self._limit = max(self._limit, int((1 + _SLACK) * held_bytes("cpu")))
        until_full = (self._limit - held_bytes("cpu")) / _GROWTH
        return max(pause, min(_LONGEST_SECONDS, max(_SHORTEST_SECONDS, until_full)))

    def start(self) -> None:
        """Start the thread that watches the process until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and join it."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.look()):
            pass
