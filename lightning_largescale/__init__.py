"""Large models under PyTorch Lightning: `Trainer(strategy="largescale_auto")`.

Importing the package registers the strategy strings, as `import torch` does where the package is installed. The names
below are loaded when they are first used, so that the import itself costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_largescale import _autoload

if TYPE_CHECKING:
    from lightning_largescale.auto import LargeScaleAutoStrategy
    from lightning_largescale.checkpoint import consolidate
    from lightning_largescale.errors import PlanError
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner import Report, find_plans
    from lightning_largescale.strategy import LargeScaleStrategy
    from lightning_largescale.workload import Workload

__version__ = "0.1.0"

__all__ = [
    "Hardware",
    "LargeScaleAutoStrategy",
    "LargeScaleStrategy",
    "Plan",
    "PlanError",
    "Report",
    "Workload",
    "__version__",
    "consolidate",
    "find_plans",
]

_HOME = {
    "Hardware": "hardware",
    "LargeScaleAutoStrategy": "auto",
    "LargeScaleStrategy": "strategy",
    "Plan": "plan",
    "PlanError": "errors",
    "Report": "planner",
    "Workload": "workload",
    "consolidate": "checkpoint",
    "find_plans": "planner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoload.on_import()
