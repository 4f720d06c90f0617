"""The link that each collective of a plan runs over, by mesh axis: inside a node, or between nodes and shared.

Ranks are numbered node by node, and in the mesh those of tensor parallelism first, then the shards: the parts of one
block are on consecutive ranks, its shards `tp` apart, and the replicas of a shard `tp * dp_shard`.

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
        tensor: of activations and their gradients, along tp: an all-reduce.
        tables: of rows that all ranks exchange: one hop to each.
    """

    all_gather: Link | None
    reduce_scatter: Link | None
    all_reduce: Link | None
    tensor: Link | None
    tables: Link | None


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
        return Links(
            all_gather=rates.all_gather,
            reduce_scatter=rates.reduce_scatter,
            all_reduce=rates.all_reduce,
            tensor=rates.all_reduce,
            tables=rates.all_gather or rates.all_reduce,
        )
    node, shards = hardware.ranks_per_node, plan.tp * plan.dp_shard
    all_reduce = _shared(rates.all_reduce, min(shards, node))
    # Every rank sends to every other.
    tables = _shared(rates.all_gather or rates.all_reduce, node)
    if node % plan.tp == 0:
        # The hops of an all-reduce are those of the other two.
        tensor = rates.node_reduce_scatter or rates.node_all_gather or rates.all_reduce
    else:
        tensor = _shared(rates.all_reduce, 1 if plan.tp % node == 0 else 2)
    if node % shards == 0:
        return Links(
            all_gather=rates.node_all_gather or rates.all_gather,
            reduce_scatter=rates.node_reduce_scatter or rates.reduce_scatter,
            all_reduce=all_reduce,
            tensor=tensor,
            tables=tables,
        )
    # Where whole nodes make no group, a node has the end of one group and the start of the next.
    groups = min(plan.tp, node) * (1 if shards % node == 0 else 2)
    return Links(
        all_gather=_shared(rates.all_gather, groups),
        reduce_scatter=_shared(rates.reduce_scatter, groups),
        all_reduce=all_reduce,
        tensor=tensor,
        tables=tables,
    )


def _shared(link: Link | None, groups: int) -> Link | None:
    return link and dataclasses.replace(link, bandwidth=link.bandwidth / groups)
