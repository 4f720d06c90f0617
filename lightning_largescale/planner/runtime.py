"""Step time of a plan: compute, communication and memory traffic as named terms in seconds, less what overlaps.

Operations with FLOPs (matrix products, attention, convolutions) cost their FLOPs at the measured matmul rate of their
dtype; all others cost the bytes they read and write at the measured memory bandwidth.

Source: Williams et al. 2009, "Roofline", section 3; Thakur et al. 2005, "Optimization of Collective Communication
    Operations in MPICH", section 4 (ring algorithms); Rajbhandari et al. 2020, "ZeRO", section 7 (communication volume
    of each stage).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_largescale.hardware import Hardware, Link, Rates
from lightning_largescale.plan import Plan
from lightning_largescale.planner.as_run import communicated_share
from lightning_largescale.planner.links import Links, plan_links
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.transfers import Away, Passes, transfers
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE
from lightning_largescale.workload import Segment, Workload

# On CPU nothing overlaps: gloo runs a collective on the cores that would compute meanwhile, and FSDP2 waits for each.
_OVERLAPS = {"cpu": False, "cuda": True}
# Share of a step's allocations that is fresh memory, under the plans that manage their heap during the step.
_AFRESH = {"mapped": 1.0, "watched": 0.25}


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeEstimate:
    """Seconds of one optimizer step on every rank, all micro-batches included.

    Attributes:
        terms: seconds by term, largest first; terms of 0 s are left out.
        hidden_seconds: seconds of communication and of transfers between tiers that overlap with compute; they are
            inside `terms` and subtracted from the sum.
    """

    terms: Mapping[str, float] = field(default_factory=dict)
    hidden_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """The sum of the terms less the hidden seconds."""
        return sum(self.terms.values()) - self.hidden_seconds


def step_time(workload: Workload, plan: Plan, hardware: Hardware, *, accumulate_grad_batches: int = 1) -> TimeEstimate:
    """Return the time of one optimizer step of `workload` under `plan` on `hardware`.

    Args:
        workload: the traced step, of one rank's micro-batch.
        plan: the plan to price.
        hardware: the hardware, with `rates` and the links that the plan communicates over.
        accumulate_grad_batches: micro-batches between optimizer steps.

    Raises:
        ValueError: `hardware` has no rates, or lacks a link.

    Source: the module's docstring.
    """
    rates = hardware.rates
    if rates is None:
        raise ValueError("hardware has no measured rates; give Hardware.detect().calibrate() or Hardware.named(...).")
    return time_of(Sizes(workload, plan, hardware.kind, accumulate_grad_batches), hardware, rates)


def time_of(sizes: Sizes, hardware: Hardware, rates: Rates) -> TimeEstimate:
    """Return `step_time` of the plan of `sizes`."""
    terms, hidden_seconds = beside_transfers(sizes, hardware, rates)
    if sizes.plan.offloads:
        moved = transfers(Away.of(sizes), Passes.of(sizes, terms), rates, sizes.kind)
        terms, hidden_seconds = {**terms, **moved.terms}, hidden_seconds + moved.hidden_seconds
    shown = sorted(((name, seconds) for name, seconds in terms.items() if seconds), key=lambda item: -item[1])
    return TimeEstimate(terms=dict(shown), hidden_seconds=hidden_seconds)


def beside_transfers(sizes: Sizes, hardware: Hardware, rates: Rates) -> tuple[dict[str, float], float]:
    """Return the terms of a step without transfers between tiers, and the seconds of them that are hidden."""
    plan, micro = sizes.plan, sizes.accumulate
    links = plan_links(plan, hardware)
    terms = {
        "forward": micro * sum(_segment_seconds(s, rates, plan, backward=False) for s in sizes.step.segments),
        "backward": micro * sum(_segment_seconds(s, rates, plan, backward=True) for s in sizes.step.segments),
        "recomputation": micro * recompute_seconds(sizes, rates),
        "all-gather": micro * sum(all_gathers_seconds(sizes, links, backward=again) for again in (False, True)),
        "reduce-scatter": reduce_scatters_seconds(sizes, links),
        "all-reduce": all_reduces_seconds(sizes, links),
        "table exchange": table_seconds(sizes, links, micro),
        "agreement": agreement_seconds(sizes, links, micro),
        "tensor parallel": micro * tensor_seconds(sizes, links),
        "shard copies": copies_seconds(sizes, rates, micro),
        "page faults": page_fault_seconds(sizes, rates, micro),
        "optimizer step": optimizer_seconds(sizes, rates),
    }
    return terms, _hidden_seconds(sizes, links, terms) if _OVERLAPS[hardware.kind] else 0.0


def all_gather_seconds(shard_bytes: int, ranks: int, link: Link | None) -> float:
    """Return the seconds of one ring all-gather that overlaps with nothing.

    Args:
        shard_bytes: bytes that each rank contributes, padding included; every rank ends with `ranks * shard_bytes`.
        ranks: size of the mesh axis; 1 costs 0 s.
        link: latency (seconds per hop) and bandwidth (bytes per second, one direction) of the slowest pair.

    Source: Thakur et al. 2005, section 4.1: (p-1) (latency + shard / bandwidth).
    """
    return _ring_seconds(shard_bytes, ranks - 1, link)


def reduce_scatter_seconds(shard_bytes: int, ranks: int, link: Link | None) -> float:
    """Return the seconds of one ring reduce-scatter with a result of `shard_bytes` per rank.

    Arguments as for `all_gather_seconds`.

    Source: Thakur et al. 2005, section 4.2: (p-1) (latency + shard / bandwidth), the arithmetic inside the measured
        bandwidth.
    """
    return _ring_seconds(shard_bytes, ranks - 1, link)


def all_reduce_seconds(whole_bytes: int, ranks: int, link: Link | None) -> float:
    """Return the seconds of one ring all-reduce of `whole_bytes`; arguments as for `all_gather_seconds`.

    Source: Thakur et al. 2005, section 4.5: a reduce-scatter and an all-gather, 2 (p-1) hops of whole / p bytes.
    """
    return _ring_seconds(whole_bytes // max(1, ranks), 2 * (ranks - 1), link)


def recompute_seconds(sizes: Sizes, rates: Rates) -> float:
    """Return the seconds of recomputation per micro-batch.

    Source: Chen et al. 2016, section 4: one extra forward of what is recomputed.
    """
    if sizes.workload.stage != "fit":
        return 0.0
    return sum(again_seconds(sizes, segment, rates) for segment in sizes.step.segments if sizes.recomputes(segment))


def again_seconds(sizes: Sizes, segment: Segment, rates: Rates) -> float:
    """Return the seconds of recomputing `segment` per micro-batch, without products if their results are kept."""
    return _segment_seconds(_again(sizes, segment), rates, sizes.plan, backward=False)


def _again(sizes: Sizes, segment: Segment) -> Segment:
    """Return `segment` as its forward is recomputed: without matrix products if their results are kept."""
    if sizes.plan.checkpointed_operations == "all":
        return segment
    return replace(
        segment,
        forward_flops=0,
        forward_moved_bytes=segment.forward_moved_bytes - segment.moved_product_bytes,
        forward_large_bytes=max(0, segment.forward_large_bytes - segment.product_bytes),
    )


def all_gathers_seconds(sizes: Sizes, links: Links, *, backward: bool) -> float:
    """Return the seconds of all-gathers in one micro-batch: of all groups in forward, of resharded groups in backward.

    Source: ZeRO, section 7.2: parameters travel once more under stage 3 than under stage 2.
    """
    again = sizes.plan.reshard_after_forward and sizes.workload.stage == "fit"
    if not sizes.gathers or (backward and not again):
        return 0.0
    # The root stays gathered until its backward is done.
    gathered = [block for block in sizes.groups if block is not None or not backward]
    return sum(_group_all_gather_seconds(sizes, block, links) for block in gathered)


def reduce_scatters_seconds(sizes: Sizes, links: Links) -> float:
    """Return the seconds of reduce-scatters of all groups' gradients in one optimizer step.

    They run once a step, or in every micro-batch if parameters are offloaded: unsharded gradients then have no place.

    Source: ZeRO, section 7.1.
    """
    if not sizes.gathers or sizes.workload.stage != "fit":
        return 0.0
    return sizes.reductions * sum(_group_reduce_scatter_seconds(sizes, block, links) for block in sizes.groups)


def all_reduces_seconds(sizes: Sizes, links: Links) -> float:
    """Return the seconds of all-reduces of gradients over the replicas in one optimizer step.

    Without sharding one all-reduce of all gradients; under HSDP one of each group's shards for each reduce-scatter.

    Source: Li et al. 2020, "PyTorch Distributed", section 3.2; Zhao et al. 2023, "PyTorch FSDP", section 3.2.2.
    """
    if sizes.workload.stage != "fit":
        return 0.0
    if not sizes.gathers:
        dense_bytes = sizes.gradients - sizes.table_gradients
        return all_reduce_seconds(dense_bytes, sizes.plan.dp_replicate, links.all_reduce)
    return sizes.reductions * sum(_group_all_reduce_seconds(sizes, block, links) for block in sizes.groups)


def tensor_seconds(sizes: Sizes, links: Links) -> float:
    """Return the seconds of tensor-parallel communication per micro-batch.

    Activations are communicated in forward, and again in recomputation; their gradients in backward.

    Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    if not sizes.tensor_costs:
        return 0.0
    element = communicated_share(sizes.plan.precision)
    summed: list[int] = []
    halves: list[int] = []
    trains = sizes.workload.stage == "fit"
    # The code outside of blocks counts once, however many segments it has.
    runs = [segment for segment in sizes.step.segments if segment.block is not None]
    for name, again in [("", False), *((segment.block or "", sizes.recomputes(segment)) for segment in runs)]:
        found = sizes.tensor_costs.get(name)
        if found is not None:
            times = 2 if trains and again else 1
            summed += found.forward_reduced * times + (found.backward_reduced if trains else ())
            halves += found.forward_halves * times + (found.backward_halves if trains else ())
    ranks, link = sizes.plan.tp, links.tensor
    seconds = sum(all_reduce_seconds(int(size * element), ranks, link) for size in summed)
    return seconds + sum(all_gather_seconds(int(size * element) // ranks, ranks, link) for size in halves)


def table_seconds(sizes: Sizes, links: Links, micro_batches: int) -> float:
    """Return the seconds of look-ups in row-sharded tables, and of sending their gradients, in one optimizer step.

    A look-up sends counts, ids and rows in every micro-batch. Gradients send ids and rows once a step, after one
    exchange of counts for all tables. A rank's own share of what it sends does not travel.

    Source: Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
        section 3; Thakur et al. 2005, section 4 (an all-to-all by p-1 exchanges).
    """
    ranks, link = sizes.plan.world_size, links.tables
    seconds = 0.0
    for table in sizes.tables:
        rows = min(sizes.looked_up, table.shape[0])
        sent = rows * (table.bytes // max(1, table.shape[0]))
        hops = [0, rows * 8, sent]
        forward = sum(all_gather_seconds(size // ranks, ranks, link) for size in hops)
        trained = sizes.workload.stage == "fit" and table.trainable
        backward = sum(all_gather_seconds(size // ranks, ranks, link) for size in hops[1:]) if trained else 0.0
        seconds += micro_batches * forward + backward
    # The counts of the gradients, and the end of each micro-batch.
    return seconds + (1 + micro_batches) * all_gather_seconds(0, ranks, link) if sizes.tables else 0.0


def agreement_seconds(sizes: Sizes, links: Links, micro_batches: int) -> float:
    """Return the seconds in which ranks exchange what they are about to gather and to reduce.

    They exchange it at each synchronization point, and before each collective if ranks may run different modules.

    Source: lightning_largescale.parallel.agreement; Thakur et al. 2005, section 4.5 (recursive doubling: a latency each
        time that the ranks double).
    """
    ranks, link = sizes.plan.world_size // sizes.plan.tp, links.all_gather
    if not sizes.gathers or ranks == 1 or link is None:
        return 0.0
    trains = sizes.workload.stage == "fit"
    told = 2 if trains else 1
    if sizes.workload.branches:
        told += len(sizes.groups) * ((1 + sizes.plan.reshard_after_forward + 1) if trains else 1)
    return told * micro_batches * math.ceil(math.log2(ranks)) * link.latency_seconds


def copies_seconds(sizes: Sizes, rates: Rates, micro_batches: int) -> float:
    """Return the seconds of copying groups out of the all-gather buffer and gradients into the reduce-scatter buffer.

    Each copy reads and writes its bytes.

    Source: torch.distributed.fsdp, `foreach_all_gather_copy_out` and `foreach_reduce_scatter_copy_in`.
    """
    if not sizes.gathers:
        return 0.0
    twice = sizes.plan.reshard_after_forward and sizes.workload.stage == "fit"
    moved = 0.0
    for block in sizes.groups:
        moved += 2 * sizes.gathered(block) * (2 if twice and block is not None else 1) * micro_batches
        moved += 2 * sizes.reductions * sizes.gradient(block, whole=True) if sizes.workload.stage == "fit" else 0
    return moved / rates.memory_bandwidth


def page_fault_seconds(sizes: Sizes, rates: Rates, micro_batches: int) -> float:
    """Return the seconds of page faults on a step's fresh memory, under plans that return freed memory to the system.

    Counted are the large tensors in the trace, the flat buffer and the parameters of each all-gather, and the flat copy
    of each group's gradients. Allocations of the optimizer's step are left out.

    Source: torch.distributed.fsdp, `foreach_all_gather` and `foreach_reduce`; man page mallopt(3), M_MMAP_THRESHOLD.
    """
    if rates.fresh_memory is None or sizes.kind != "cpu" or sizes.plan.heap not in _AFRESH:
        return 0.0
    made = sum(segment.forward_large_bytes + segment.backward_large_bytes for segment in sizes.step.segments)
    again = [_again(sizes, segment) for segment in sizes.step.segments if sizes.recomputes(segment)]
    made += sum(segment.forward_large_bytes for segment in again)
    reduced = 0
    if sizes.gathers:
        twice = sizes.plan.reshard_after_forward and sizes.workload.stage == "fit"
        made += sum(2 * sizes.gathered(block) * (2 if twice and block else 1) for block in sizes.groups)
        reduced = sizes.reductions * sum(sizes.gradient(block, whole=True) for block in sizes.groups)
    return _AFRESH[sizes.plan.heap] * (made * micro_batches + reduced) / rates.fresh_memory


def optimizer_seconds(sizes: Sizes, rates: Rates) -> float:
    """Return the seconds of `step()` on the rank's shards: the bytes it reads and writes, at memory bandwidth."""
    if sizes.workload.stage != "fit" or not sizes.full_parameters:
        return 0.0
    moved = sum(needs.moved_bytes for needs in sizes.workload.optimizers)
    # Only table rows that have a gradient are stepped on.
    stepped = sizes.parameters - sum(map(sizes.local, sizes.tables)) + sizes.table_gradients
    return moved * stepped / sizes.full_parameters / rates.memory_bandwidth


def _segment_seconds(segment: Segment, rates: Rates, plan: Plan, *, backward: bool) -> float:
    rate = rates.matmul_rate(MATMUL_TYPE[plan.precision])
    if rate is None:
        raise ValueError(f"the hardware has no rate of matrix products for {plan.precision}.")
    flops = segment.backward_flops if backward else segment.forward_flops
    moved = segment.backward_moved_bytes if backward else segment.forward_moved_bytes
    return flops / rate + moved / rates.memory_bandwidth


def _hidden_seconds(sizes: Sizes, links: Links, terms: Mapping[str, float]) -> float:
    """Return the seconds of communication that overlap with compute.

    All-gathers overlap with the pass they are for, reductions with the last backward. The first all-gathers of a
    forward and the last reductions (those of the root, and of an embedding that is a group of its own) have no compute
    to overlap with.
    """
    micro = sizes.accumulate
    forward, backward = terms["forward"] / micro, (terms["backward"] + terms["recomputation"]) / micro
    gathers, again = (all_gathers_seconds(sizes, links, backward=passed) for passed in (False, True))
    reductions = terms["reduce-scatter"] + terms["all-reduce"]
    blocks = (segment.block for segment in sizes.step.segments if segment.block is not None)
    first = {next(blocks, None)} & {*sizes.plan.wrapped_modules}
    for block in {None, *first} if sizes.gathers else ():
        gathers -= _group_all_gather_seconds(sizes, block, links)
        if reductions:
            reductions -= _group_reduce_scatter_seconds(sizes, block, links)
            reductions -= _group_all_reduce_seconds(sizes, block, links)
    in_forward = micro * min(forward, max(0.0, gathers))
    in_backward = (micro - 1) * min(backward, again) + min(backward, again + max(0.0, reductions))
    return in_forward + in_backward


def _group_all_gather_seconds(sizes: Sizes, block: str | None, links: Links) -> float:
    shard = sizes.plan.dp_shard
    return all_gather_seconds(sizes.gathered(block) // shard, shard, links.all_gather)


def _group_reduce_scatter_seconds(sizes: Sizes, block: str | None, links: Links) -> float:
    return reduce_scatter_seconds(sizes.gradient(block, whole=False), sizes.plan.dp_shard, links.reduce_scatter)


def _group_all_reduce_seconds(sizes: Sizes, block: str | None, links: Links) -> float:
    return all_reduce_seconds(sizes.gradient(block, whole=False), sizes.plan.dp_replicate, links.all_reduce)


def _ring_seconds(hop_bytes: int, hops: int, link: Link | None) -> float:
    if hops <= 0:
        return 0.0
    if link is None:
        raise ValueError("the hardware lacks a link that the plan communicates over; calibrate it with all ranks.")
    return hops * (link.latency_seconds + hop_bytes / link.bandwidth)
