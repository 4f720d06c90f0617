"""Restore attributes, class and memory layout on parameters that FSDP2 gathers from shards.

FSDP2 shards contiguous tensors; the parameters that it gathers are contiguous and have no attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_largescale import compat
from lightning_largescale.parallel.order import Whole, as_whole, memory_order
from lightning_largescale.parallel.parameter_access import GRADIENT

if TYPE_CHECKING:
    from lightning_largescale.parallel.sharded import Sharded


@dataclass(frozen=True)
class Before:
    """Layout, class and attributes of a parameter before it was sharded."""

    whole: Whole
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Before:
        """Return those of `parameter`, without the attributes that this package set."""
        attributes = {name: value for name, value in vars(parameter).items() if not name.startswith("_largescale")}
        kind = nn.Parameter if isinstance(parameter, DTensor) else type(parameter)
        return cls(Whole(memory_order(parameter), kind), attributes)

    def tell(self, shard: nn.Parameter) -> None:
        """Set them on the shard of the parameter."""
        vars(as_whole(shard, self.whole)).update(self.attributes)

    def come_back(self, full: nn.Parameter) -> None:
        """Restore them on `full`, the parameter gathered from shards."""
        if self.whole.kind is not nn.Parameter and not isinstance(full, DTensor):
            full.__class__ = self.whole.kind
        vars(full).update(self.attributes)
        if self.whole.dims is not None:
            trained = full.requires_grad
            # Autograd gives a gradient its parameter's layout, and FSDP reduces contiguous gradients.
            full.requires_grad_().register_post_accumulate_grad_hook(_make_contiguous)  # type: ignore[no-untyped-call]
            full.requires_grad_(trained)


def made_contiguous(module: nn.Module, but: set[nn.Parameter]) -> dict[str, Before]:
    """Make the parameters of `module`, except those in `but`, contiguous for FSDP.

    Returns:
        Layout, class and attributes by name, of parameters where these are not the defaults.
    """
    before: dict[str, Before] = {}
    for name, parameter in module.named_parameters():
        if parameter not in but:
            before[name] = Before.of(parameter)
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
    return {name: one for name, one in before.items() if one != Before(Whole(), {})}


def restore_when_gathered(state: Sharded) -> None:
    """Make FSDP2 gather parameters with the layout, class and attributes that they had before they were sharded."""
    groups = {shard: group for group in state.every_group() for shard, _ in compat.shards_of(group)}
    for name, one in state.layouts.items():
        shard = cast(nn.Module, state.groups[""]).get_parameter(name)
        compat.when_gathered(groups[shard], shard, one.come_back, one.whole.dims)


def _make_contiguous(full: Tensor) -> None:
    assert full.grad is not None
    GRADIENT.__set__(full, full.grad.contiguous())
