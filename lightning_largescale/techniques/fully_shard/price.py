"""Price of sharding: groups that are gathered for a while, and their collectives.

Source: torch.distributed.fsdp.fully_shard; Rajbhandari et al. 2020, "ZeRO", section 7 (communication volume of each
    stage).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.costs import all_gather_seconds, reduce_scatter_seconds, shared
from lightning_largescale.planner.price import Fields, Moment, Overlap, Price, Terms

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Link, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Workload


class FullyShardPrice(Price):
    """Parameters in groups, each gathered for its computation, from other ranks or from another tier."""

    passing_terms = ("unreduced gradients", "communication", "gathered parameters")

    @override
    def rank_options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        ranks = hardware.world_size // plan.world_size
        most = 1 if workload.whole else ranks
        return [{"dp_shard": shard} for shard in range(1, most + 1) if ranks % shard == 0]

    @override
    def options_on_ranks(self, workload: Workload, plan: Plan) -> Iterable[Fields]:
        if plan.dp_shard == 1:
            return ({},)
        # If parameters stay gathered until backward, wrapping modules costs no time and saves memory.
        found = _large_modules(workload)
        options = dict.fromkeys(((True, ()), (True, found), (False, found)))
        return [{"reshard_after_forward": reshard, "extra_fsdp_modules": wraps} for reshard, wraps in options]

    @override
    def gathered_options(self, workload: Workload) -> Iterable[Fields]:
        return [{"extra_fsdp_modules": wraps} for wraps in dict.fromkeys(((), _large_modules(workload)))]

    @override
    def impossible(self, workload: Workload, hardware: Hardware) -> Iterable[tuple[Fields, str]]:
        if workload.whole:
            yield {"dp_shard": max(2, hardware.world_size)}, workload.whole

    @override
    def lay_out(self, sizes: GroupSizes) -> None:
        sizes.gather_ranks = sizes.plan.dp_shard
        sizes.group_names |= {*sizes.plan.extra_fsdp_modules}

    @override
    def memory(self, sizes: Sizes, moment: Moment, *, built: bool) -> Terms:
        if not sizes.gathers or moment == "optimizer step":
            return {}
        if moment == "setup":
            return _at_setup(sizes, built=built)
        segments = range(len(sizes.blocks))
        if moment == "forward":
            return {"gathered parameters": [_gathered_in_forward(sizes, index) for index in segments]}
        terms = [_in_backward(sizes, index) for index in segments]
        if moment == "gradient reduction":
            terms = [_in_reduction(sizes, index, found) for index, found in enumerate(terms)]
        return {name: [found[name] for found in terms] for name in self.passing_terms} if terms else {}

    @override
    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        if not sizes.gathers:
            return {}
        gather, scatter = shard_links(sizes.plan, hardware, rates)
        gathers = sum(_all_gathers_seconds(sizes, gather, backward=again) for again in (False, True))
        return {
            "all-gather": sizes.accumulate * gathers,
            "reduce-scatter": _reduce_scatters_seconds(sizes, scatter),
            "agreement": _agreement_seconds(sizes, gather),
            "shard copies": _copied_bytes(sizes) / rates.memory_bandwidth,
        }

    @override
    def overlap(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Overlap:
        if not sizes.gathers:
            return Overlap()
        gather, scatter = shard_links(sizes.plan, hardware, rates)
        first, again = (_all_gathers_seconds(sizes, gather, backward=backward) for backward in (False, True))
        reductions = _reduce_scatters_seconds(sizes, scatter)
        for block in sizes.beside_no_compute:
            first -= _group_all_gather_seconds(sizes, block, gather)
            reductions -= _group_reduce_scatter_seconds(sizes, block, scatter) if reductions else 0.0
        return Overlap(forward=first, backward=again, last_backward=reductions)

    @override
    def fresh_bytes(self, sizes: Sizes) -> tuple[int, int]:
        """Return the flat buffer and the parameters of each all-gather, and the flat copy of each group's gradients.

        Source: torch.distributed.fsdp, `foreach_all_gather` and `foreach_reduce`.
        """
        if not sizes.gathers:
            return 0, 0
        twice = sizes.plan.gathers_again and sizes.workload.stage == "fit"
        made = sum(2 * sizes.gathered(block) * (2 if twice and block else 1) for block in sizes.groups)
        return made, sizes.reductions * sum(sizes.gradient(block, whole=True) for block in sizes.groups)


def _large_modules(workload: Workload) -> tuple[str, ...]:
    # Evaluation keeps wrapped modules gathered, so that wrapping them gains nothing.
    return workload.wraps if workload.stage == "fit" else ()


def shard_links(plan: Plan, hardware: Hardware, rates: Rates) -> tuple[Link | None, Link | None]:
    """Return the links of all-gathers and of reduce-scatters, along the axis of the mesh around the innermost.

    A group inside a node has the node's own link, or that of all ranks if the node's was not measured. Groups that
    cross nodes communicate at the same time, and share the bandwidth that one group of all ranks would have.

    Args:
        plan: the plan.
        hardware: the hardware.
        rates: its rates.

    Source: torch.distributed.device_mesh (ranks in row-major order).
    """
    node, shards = hardware.ranks_per_node, plan.ranks_per_replica
    if hardware.nodes == 1:
        return rates.all_gather, rates.reduce_scatter
    if node % shards == 0:
        return rates.node_all_gather or rates.all_gather, rates.node_reduce_scatter or rates.reduce_scatter
    # If nodes do not divide a group evenly, a node has the end of one group and the start of the next.
    groups = min(shards // plan.dp_shard, node) * (1 if shards % node == 0 else 2)
    return shared(rates.all_gather, groups), shared(rates.reduce_scatter, groups)


def _at_setup(sizes: Sizes, *, built: bool) -> dict[str, int]:
    """Return the full model as the user built it, and a group's shard beside its full copy.

    On CUDA the full model is in DRAM, and only the group that is being sharded is on the device, twice while rank 0's
    values are broadcast. The same holds on the CPU for a model that is not materialized yet, but once.
    """
    # Parameters in no group are sharded one after the other, each beside its full copy.
    alone = max(map(sizes.local, sizes.ungrouped_parameters), default=0)
    largest = max((sizes.gathered(block) for block in sizes.groups), default=0)
    if sizes.kind == "cpu" and built:
        gathered = max(largest // sizes.plan.dp_shard, alone)
        return {"parameters": sizes.full_parameters, "gathered parameters": gathered}
    copies = 1 if sizes.kind == "cpu" else 2
    return {"parameters": sizes.parameters_here, "gathered parameters": max(copies * largest, 0 if built else alone)}


def _gathered_in_forward(sizes: Sizes, index: int) -> int:
    gathered = sizes.gathered_so_far[index]
    if sizes.plan.gathers_again:
        gathered = _gathered_at(sizes, {sizes.blocks[index]})
    return gathered + _received(sizes, index) + _joined(sizes)


def _in_backward(sizes: Sizes, index: int) -> dict[str, int]:
    """Return the terms during one segment's backward, with the all-gather of the next group in flight."""
    gathered, joined = sizes.gathered_so_far[index], _joined(sizes)
    if sizes.plan.gathers_again:
        gathered = _gathered_at(sizes, {sizes.blocks[index], _gathered_ahead(sizes, index)})
    return {
        "gathered parameters": gathered + joined,
        "unreduced gradients": _unreduced(sizes, index) + joined,
        "communication": _sent(sizes, index),
    }


def _in_reduction(sizes: Sizes, index: int, terms: dict[str, int]) -> dict[str, int]:
    """Return the terms while a group's gradients are reduced: unsharded gradients, flat send copy, reduced shard.

    On CPU all three are live. On CUDA the group's gathered parameters are freed before, and the unsharded gradients
    once they are copied. The fragmentation of a CPU's heap was measured with these terms.

    Source: torch.distributed.fsdp, `foreach_reduce`.
    """
    block = sizes.blocks[index]
    whole = sizes.gradient(block, whole=True)
    if sizes.kind == "cpu":
        return {**terms, "communication": whole + sizes.gradient(block, whole=False)}
    terms = {**terms, "communication": whole}
    if block is not None:
        terms["gathered parameters"] -= sizes.gathered(block)
        if sizes.reductions == sizes.accumulate:
            terms["unreduced gradients"] += whole - sizes.own_gradient(index)
    return terms


def _received(sizes: Sizes, index: int) -> int:
    """Return the bytes of the last all-gather's output in forward, live until the copy-out for the next one.

    On CPU it is part of the measured fragmentation of the heap.

    Source: torch.distributed.fsdp, `AllGatherState`.
    """
    if sizes.kind == "cpu" or sizes.plan.dp_shard == 1:
        return 0
    return sizes.gathered(next((block for block in sizes.blocks[index::-1] if block is not None), None))


def _sent(sizes: Sizes, index: int) -> int:
    """Return the bytes of the previous group's reduce-scatter input, live until the next group is reduced.

    On CPU it is part of the measured fragmentation of the heap.

    Source: torch.distributed.fsdp, `ReduceScatterState`.
    """
    if sizes.kind == "cpu" or sizes.reductions < sizes.accumulate:
        return 0
    after = sizes.block_beside(index, 1)
    return 0 if after is None else sizes.gradient(after, whole=True)


def _gathered_ahead(sizes: Sizes, index: int) -> str | None:
    """Return the block that is prefetched during the backward of segment `index`; None if it is not prefetched.

    Source: torch.distributed.fsdp, which copies on a mesh of one rank when the block is about to run.
    """
    alone = sizes.kind == "cuda" and sizes.plan.dp_shard == 1
    return None if alone else sizes.block_beside(index, -1)


def _joined(sizes: Sizes) -> int:
    """Return the parameter bytes, or gradient bytes, of a block whose collectives this rank joins without running it.

    Only models with branches have such blocks, as ranks may run different ones.
    """
    if not sizes.workload.branches or sizes.plan.dp == 1:
        return 0
    return max((sizes.gathered(block) for block in sizes.groups if block is not None), default=0)


def _unreduced(sizes: Sizes, index: int) -> int:
    """Return the unsharded gradient bytes of the group that runs backward and of the root, which is reduced last."""
    if sizes.reductions < sizes.accumulate:
        return 0
    return sizes.own_gradient(index) + sizes.root_gradient(index, whole=True)


def _gathered_at(sizes: Sizes, blocks: set[str | None]) -> int:
    """Return the bytes of unsharded parameters of the root and of `blocks`."""
    return sum(sizes.gathered(name) for name in {None, *blocks})


def _all_gathers_seconds(sizes: Sizes, link: Link | None, *, backward: bool) -> float:
    """Return the seconds of all-gathers in one micro-batch: of all groups in forward, of resharded groups in backward.

    Source: ZeRO, section 7.2: parameters travel once more under stage 3 than under stage 2.
    """
    if backward and not (sizes.plan.gathers_again and sizes.workload.stage == "fit"):
        return 0.0
    # The root stays gathered until its backward is done.
    gathered = [block for block in sizes.groups if block is not None or not backward]
    return sum(_group_all_gather_seconds(sizes, block, link) for block in gathered)


def _reduce_scatters_seconds(sizes: Sizes, link: Link | None) -> float:
    """Return the seconds of reduce-scatters of all groups' gradients in one optimizer step.

    Source: ZeRO, section 7.1.
    """
    if sizes.workload.stage != "fit":
        return 0.0
    return sizes.reductions * sum(_group_reduce_scatter_seconds(sizes, block, link) for block in sizes.groups)


def _group_all_gather_seconds(sizes: Sizes, block: str | None, link: Link | None) -> float:
    shard = sizes.plan.dp_shard
    return all_gather_seconds(sizes.gathered(block) // shard, shard, link)


def _group_reduce_scatter_seconds(sizes: Sizes, block: str | None, link: Link | None) -> float:
    return reduce_scatter_seconds(sizes.gradient(block, whole=False), sizes.plan.dp_shard, link)


def _agreement_seconds(sizes: Sizes, link: Link | None) -> float:
    """Return the seconds in which ranks exchange what they are about to gather and to reduce.

    They exchange it at each synchronization point, and before each collective if ranks may run different modules.

    Source: lightning_largescale.parallel.agreement; Thakur et al. 2005, "Optimization of Collective Communication
        Operations in MPICH", section 4.5 (recursive doubling: a latency each time that the ranks double).
    """
    ranks = sizes.plan.dp
    if ranks == 1 or link is None:
        return 0.0
    trains = sizes.workload.stage == "fit"
    told = 2 if trains else 1
    if sizes.workload.branches:
        told += len(sizes.groups) * ((1 + sizes.plan.gathers_again + 1) if trains else 1)
    return told * sizes.accumulate * math.ceil(math.log2(ranks)) * link.latency_seconds


def _copied_bytes(sizes: Sizes) -> float:
    """Return the bytes read and written to copy groups out of all-gather buffers, and gradients into those to send.

    Source: torch.distributed.fsdp, `foreach_all_gather_copy_out` and `foreach_reduce_scatter_copy_in`.
    """
    twice = sizes.plan.gathers_again and sizes.workload.stage == "fit"
    moved = 0.0
    for block in sizes.groups:
        moved += 2 * sizes.gathered(block) * (2 if twice and block is not None else 1) * sizes.accumulate
        moved += 2 * sizes.reductions * sizes.gradient(block, whole=True) if sizes.workload.stage == "fit" else 0
    return moved
