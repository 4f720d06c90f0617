"""Price of tables whose rows are sharded: the rows a rank holds, and their exchange.

Source: Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
    section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.costs import all_gather_seconds, shared
from lightning_largescale.planner.price import Moment, Price, Terms

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Link, Rates
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Parameter

# Bytes of a row id, as tables receive it.
_ID_BYTES = 8


class RowWiseEmbeddingPrice(Price):
    """Tables that are in no group: each rank has a share of their rows, and gradients of the rows it looked up."""

    @override
    def lay_out(self, sizes: GroupSizes) -> None:
        names = {f"{name}.weight" for name in sizes.plan.row_sharded_embeddings} if sizes.plan.world_size > 1 else set()
        for table in sizes.workload.parameters if names else ():
            if not names.isdisjoint((table.name, *table.aliases)):
                kept = math.ceil(table.shape[0] / sizes.plan.world_size) * _row_bytes(table)
                sizes.ungrouped[table.name] = kept, min(kept, _looked_up(sizes) * _row_bytes(table))

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        if moment != "setup" or sizes.gathers:
            return {}
        # Tables are sharded one after the other, each beside its full copy.
        return {"rows of a table": max(map(sizes.local, sizes.ungrouped_parameters), default=0)}

    @override
    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        if not sizes.ungrouped:
            return {}
        link = rates.all_gather or rates.all_reduce
        if hardware.nodes > 1:
            # Every rank sends to every other.
            link = shared(link, hardware.ranks_per_node)
        return {"table exchange": _exchange_seconds(sizes, link)}


def _exchange_seconds(sizes: Sizes, link: Link | None) -> float:
    """Return the seconds of look-ups in the tables, and of sending their gradients, in one optimizer step.

    A look-up sends counts, ids and rows in every micro-batch. Gradients send ids and rows once a step, after one
    exchange of counts for all tables. A rank's own share of what it sends does not travel.

    Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH", section 4 (an all-to-all
        by p-1 exchanges).
    """
    ranks = sizes.plan.world_size
    seconds = 0.0
    for table in sizes.ungrouped_parameters:
        rows = min(_looked_up(sizes), table.shape[0])
        hops = [0, rows * _ID_BYTES, rows * _row_bytes(table)]
        forward = sum(all_gather_seconds(size // ranks, ranks, link) for size in hops)
        trained = sizes.workload.stage == "fit" and table.trainable
        backward = sum(all_gather_seconds(size // ranks, ranks, link) for size in hops[1:]) if trained else 0.0
        seconds += sizes.accumulate * forward + backward
    # The counts of the gradients, and the end of each micro-batch.
    return seconds + (1 + sizes.accumulate) * all_gather_seconds(0, ranks, link)


def _looked_up(sizes: GroupSizes) -> int:
    """Return an upper bound of the rows of one table that a rank looks up per micro-batch, as if its batch were ids.

    Other ranks are assumed to look up as many of this rank's rows as it looks up of theirs.
    """
    return sizes.workload.batch_bytes // _ID_BYTES


def _row_bytes(table: Parameter) -> int:
    return table.bytes // max(1, table.shape[0])
