"""Lightning's own precision plugin for each arithmetic that a plan can ask for.

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3; Kalamkar et al. 2019, "A Study of BFLOAT16 for
    Deep Learning Training" (no loss scaling).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision

# The type that each of these precisions converts the module to.
STORED_TYPE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
# The type that each of these precisions casts matrices to for each product; the stored type is float32.
CAST_TYPE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def lightning_plugin(precision: str, device_type: str) -> Precision:
    """Return the plugin that `Trainer(precision=precision)` makes for a device of `device_type`, "cpu" or "cuda".

    On the CPU "16-mixed" stays as it is; the Trainer would replace it by "bf16-mixed".
    """
    name: Any = precision
    if precision in CAST_TYPE:
        return MixedPrecision(name, device_type)
    if precision == "64-true":
        return DoublePrecision()
    return HalfPrecision(name) if precision in STORED_TYPE else Precision()
