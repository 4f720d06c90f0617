"""Price of replicas: their buckets of gradients, and the all-reduces.

Source: Li et al. 2020, "PyTorch Distributed", section 3.2; Zhao et al. 2023, "PyTorch FSDP", section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.costs import all_reduce_seconds, shared
from lightning_largescale.planner.price import Fields, Moment, Overlap, Price, Terms

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Link, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload


class ReplicatePrice(Price):
    """Replicas whose gradients are averaged."""

    passing_terms = ("unreduced gradients",)

    @override
    def rank_options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        # All ranks that other techniques leave.
        yield {"dp_replicate": hardware.world_size // plan.world_size}

    @override
    def lay_out(self, sizes: GroupSizes) -> None:
        # Replicas have buckets for every trainable parameter, used or not.
        sizes.in_buckets = sizes.plan.dp_replicate > 1 and not sizes.gathers

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        """Return the gradients outside of buckets: those of replicas that accumulate, before any reduction.

        Source: torch.nn.parallel.DistributedDataParallel, `no_sync` and `gradient_as_bucket_view`.
        """
        accumulates = sizes.in_buckets and sizes.accumulate > 1 and sizes.workload.stage == "fit"
        if not accumulates or moment not in ("forward", "backward"):
            return {}
        return {"unreduced gradients": sum(one.bytes for one in sizes.trained if one.name not in sizes.ungrouped)}

    @override
    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        return {"all-reduce": _all_reduces_seconds(sizes, replica_link(sizes.plan, hardware, rates))}

    @override
    def overlap(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Overlap:
        link = replica_link(sizes.plan, hardware, rates)
        reductions = _all_reduces_seconds(sizes, link)
        if reductions and sizes.gathers:
            reductions -= sum(_group_all_reduce_seconds(sizes, block, link) for block in sizes.beside_no_compute)
        return Overlap(last_backward=reductions)


def replica_link(plan: Plan, hardware: Hardware, rates: Rates) -> Link | None:
    """Return the link of all-reduces along the outermost axis of the mesh.

    Groups that cross nodes communicate at the same time, and share the bandwidth that one group of all ranks would
    have.

    Args:
        plan: the plan.
        hardware: the hardware.
        rates: its rates.
    """
    if hardware.nodes == 1:
        return rates.all_reduce
    return shared(rates.all_reduce, min(plan.ranks_per_replica, hardware.ranks_per_node))


def _all_reduces_seconds(sizes: Sizes, link: Link | None) -> float:
    """Return the seconds of all-reduces of gradients over the replicas in one optimizer step.

    Without groups one all-reduce of all gradients; under HSDP one of each group's shards for each reduce-scatter.
    """
    if sizes.workload.stage != "fit":
        return 0.0
    if not sizes.gathers:
        return all_reduce_seconds(sizes.gradients - sizes.ungrouped_gradients, sizes.plan.dp_replicate, link)
    return sizes.reductions * sum(_group_all_reduce_seconds(sizes, block, link) for block in sizes.groups)


def _group_all_reduce_seconds(sizes: Sizes, block: str | None, link: Link | None) -> float:
    return all_reduce_seconds(sizes.gradient(block, whole=False), sizes.plan.dp_replicate, link)
