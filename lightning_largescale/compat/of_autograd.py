"""Private APIs of what autograd saves."""

from __future__ import annotations

from typing import Any

import torch


def versions_of(tensor: Any) -> Any:
    """A tensor without values whose `version` is that of `tensor` from now on; it keeps none of its memory.

    Replaced by a public `torch.Tensor.version`, and a way to keep it without the tensor.
    """
    found = tensor.detach()
    # Takes all but the counter.
    found.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return found


def hooks_saved_tensors() -> bool:
    """Whether hooks on saved tensors are in force on this thread, or forbidden.

    Replaced by a public way to ask which `torch.autograd.graph.saved_tensors_hooks` is the innermost.
    """
    autograd: Any = torch._C._autograd
    return not autograd._saved_tensors_hooks_is_enabled() or bool(autograd._top_saved_tensors_default_hooks(False))


def current_backward() -> int:
    """A number of the backward under way on this thread, which one that begins within it does not share.

    Replaced by a public way to tell a backward from one within it.
    """
    return torch._C._current_graph_task_id()
