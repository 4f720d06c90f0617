"""The link that each collective of a plan runs over, by mesh axis: inside a node, or between nodes and shared.

Ranks are numbered node by node. In the DeviceMesh tensor parallelism is the innermost axis, then dp_shard: the
tensor-parallel shards of a block are on consecutive ranks, its FSDP shards `tp` apart, and the replicas of a shard
`tp * dp_shard` apart.

Source: torch.distributed.device_mesh (ranks in row-major order); Zhao et al. 2023, "PyTorch FSDP", section 3.2.2.
"""

from __future__ import annotations

import dataclasses

from lightning_largescale.hardware import Hardware, Link
from lightning_largescale.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """The links of the collectives of one plan; None if the hardware has no such link.

    Attributes:
        all_gather: for parameters, along dp_shard.
        reduce_scatter: for gradients, along dp_shard.
        all_reduce: for gradients, along dp_replicate.
        tensor: for all-reduces of activations and their gradients, along tp.
        tables: for the exchange of table rows between all ranks: one hop to each.
    """

    all_gather: Link | None
    reduce_scatter: Link | None
    all_reduce: Link | None
    tensor: Link | None
    tables: Link | None


def plan_links(plan: Plan, hardware: Hardware) -> Links:
    """Return the links of `plan`, whose sizes multiply to the ranks of `hardware`.

    A group inside a node has the node's own link, or that of all ranks if the node's was not measured. Groups that
    cross nodes communicate at the same time, and share the bandwidth that one group of all ranks would have.

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
    # If nodes do not divide a group evenly, a node has the end of one group and the start of the next.
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
