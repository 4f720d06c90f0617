"""MallocPolicy: free memory of the C heap, given back to the system."""

from __future__ import annotations

from typing_extensions import override

from lightning_largescale.hardware.usage import HeapTrimmer
from lightning_largescale.parallel.heap import HeapWatch
from lightning_largescale.run import Run
from lightning_largescale.technique import Technique


class MallocPolicy(Technique):
    """The policy of the plan for free heap memory, where the device is the CPU."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._watch: HeapWatch | None = None
        self._trim = HeapTrimmer() if run.plan.heap in ("trimmed", "mapped") else None

    @classmethod
    @override
    def wanted(cls, run: Run) -> bool:
        return run.device.type == "cpu"

    @override
    def wrap(self) -> None:
        if self.run.plan.heap == "watched":
            self._start(0)

    def _start(self, limit_bytes: int) -> None:
        """Return free heap memory to the system above `limit_bytes`, until teardown or the next call."""
        self._stop()
        self._watch = HeapWatch(limit_bytes)
        self._watch.start()

    @override
    def limit_memory(self, limit_bytes: int) -> None:
        if self.run.plan.heap == "left":
            self._start(limit_bytes)

    @override
    def after_update(self) -> None:
        if self._trim is not None:
            self._trim()

    @override
    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._watch = None
