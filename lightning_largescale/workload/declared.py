"""The tensor-parallel plan that a model's authors declare in the config of a transformers model.

Source: transformers, `PretrainedConfig.base_model_tp_plan`: styles by module name of the base model; * stands for a
    layer number.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from lightning_largescale.workload.parts import Part

# The dimension of a linear layer's weight that each style shards. Other styles say how results are combined, which is
# derived from the code itself.
_DIMS = {"colwise": 0, "rowwise": 1}


def declared_parts(module: nn.Module, block: str) -> dict[str, Part]:
    """Return the sharding that a model inside `module` declares for `block`, by parameter name within the block."""
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
    """Map patterns of module names in `module` to their declared styles."""
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        plan: Any = getattr(getattr(part, "config", None), "base_model_tp_plan", None)
        if plan and getattr(part, "base_model", None) is part:
            prefix = f"{path}." if path else ""
            found |= {prefix + pattern: style for pattern, style in plan.items()}
    return found
