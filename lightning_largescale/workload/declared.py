"""Tensor parallelism as a model's own authors declare it: the plan in the config of a transformers model.

Source: transformers, `PretrainedConfig.base_model_tp_plan`: styles by names of modules of the base model, * standing
    for the number of a layer.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from lightning_largescale.workload.parts import Part

# Of a linear layer: the dimension of its weight that a style divides. Others say how results are put together, which is
# found from what the code does.
_DIMS = {"colwise": 0, "rowwise": 1}


def declared_parts(module: nn.Module, block: str) -> dict[str, Part]:
    """What the authors of a model inside `module` declare to be divided of the block of that name; by name in it."""
    parts: dict[str, Part] = {}
    for pattern, style in _patterns(module).items():
        dim = _DIMS.get(style)
        for name, layer in module.get_submodule(block).named_modules() if dim is not None else ():
            if isinstance(layer, nn.Linear) and fnmatch.fnmatchcase(f"{block}.{name}", pattern):
                parts[f"{name}.weight"] = Part(dim or 0, (layer.weight.shape[dim or 0],))
                if dim == 0 and layer.bias is not None:
                    parts[f"{name}.bias"] = Part(0, (layer.bias.shape[0],))
    return parts


def _patterns(module: nn.Module) -> dict[str, str]:
    """Styles by pattern of a module's name in `module`."""
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        plan: Any = getattr(getattr(part, "config", None), "base_model_tp_plan", None)
        if plan and getattr(part, "base_model", None) is part:
            prefix = f"{path}." if path else ""
            found |= {prefix + pattern: style for pattern, style in plan.items()}
    return found
