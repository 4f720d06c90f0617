"""Reports fits that took more of the device than their plan was predicted to."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pretend_cuda

if TYPE_CHECKING:
    from lightning_largescale.planner.peak_memory import MemoryEstimate

# Of the prediction, and bytes that small tensors are rounded up by; no tolerance is for a term that is left out.
_SHARE, _ROUNDING = 0.02, 1 << 20


def watch() -> None:
    """Have auto strategies, which know a prediction, report from now on; in processes that are forked too."""
    from lightning_largescale.auto import LargeScaleAutoStrategy

    LargeScaleAutoStrategy.on_train_end = _checking(LargeScaleAutoStrategy.on_train_end)  # type: ignore[method-assign]


def excess(estimate: MemoryEstimate, measured: int) -> str:
    """That `measured` bytes are more than was predicted, as a report; empty where they are not."""
    # Nothing is a library's workspace here.
    predicted = estimate.measured_bytes - estimate.terms.get("runtime", 0)
    if measured <= predicted * (1 + _SHARE) + _ROUNDING:
        return ""
    return f"memory: {measured} bytes were allocated at once and {predicted} predicted, at the {estimate.moment}"


def tell(report: str) -> None:
    """Write a report where the device writes its own."""
    if report and (path := pretend_cuda.report_file()):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(file, f"{report}\n".encode())
        os.close(file)


def _checking(ended: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(ended)
    def on_train_end(self: Any) -> None:
        from lightning_largescale.hardware.usage import peak_bytes

        estimate = None if self.report is None else self.report.estimate_of(self.plan)
        measured = peak_bytes("cuda") if self.root_device.type == "cuda" else None
        if estimate is not None and measured is not None:
            tell(excess(estimate.memory, measured))
        ended(self)

    return on_train_end
