"""The link that each collective of a plan runs over, by mesh axis: inside a node, or between nodes and shared.

Ranks are numbered node by node and in the mesh shard by shard: the shards of one replica are consecutive ranks, and the
ranks that hold the same shard of every replica are `dp_shard` apart.

Source: torch.distributed.device_mesh (ranks in row-major order); Zhao et al. 2023, "PyTorch FSDP", section 3.2.2.
"""

from __future__ import annotations

import dataclasses

from lightning_largescale.hardware import Hardware, Link
from lightning_largescale.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """What the collectives of one plan run over; None where the hardware has no such link.

    Attributes:
        all_gather: of parameters, along dp_shard.
        reduce_scatter: of gradients, along dp_shard.
        all_reduce: of gradients, along dp_replicate.
    """

    all_gather: Link | None
    reduce_scatter: Link | None
    all_reduce: Link | None


def plan_links(plan: Plan, hardware: Hardware) -> Links:
    """The links of `plan`, whose sizes multiply to the ranks of `hardware`.

    A group that lies inside a node has the node's own link, that of all ranks where the node's was not measured. Groups
    that cross nodes all communicate at once, and each gets its part of what one group of all ranks would have.

    Raises:
        ValueError: `hardware` has no rates.

    Source: the module's docstring.
    """
    rates = hardware.rates
    if rates is None:
        raise ValueError("hardware has no measured rates; give Hardware.detect().calibrate() or Hardware.named(...).")
    if hardware.nodes == 1:
        return Links(all_gather=rates.all_gather, reduce_scatter=rates.reduce_scatter, all_reduce=rates.all_reduce)
    all_reduce = _shared(rates.all_reduce, min(plan.dp_shard, hardware.ranks_per_node))
    if hardware.ranks_per_node % plan.dp_shard == 0:
        return Links(
            all_gather=rates.node_all_gather or rates.all_gather,
            reduce_scatter=rates.node_reduce_scatter or rates.reduce_scatter,
            all_reduce=all_reduce,
        )
    # Where whole nodes make no group, a node has the end of one group and the start of the next.
    groups = 1 if plan.dp_shard % hardware.ranks_per_node == 0 else 2
    return Links(
        all_gather=_shared(rates.all_gather, groups),
        reduce_scatter=_shared(rates.reduce_scatter, groups),
        all_reduce=all_reduce,
    )


def _shared(link: Link | None, groups: int) -> Link | None:
    return link and dataclasses.replace(link, bandwidth=link.bandwidth / groups)
