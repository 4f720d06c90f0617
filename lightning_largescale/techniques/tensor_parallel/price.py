"""Price of tensor parallelism: shards of matrices and activations, and the communication in each block.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.costs import all_gather_seconds, all_reduce_seconds, shared
from lightning_largescale.planner.price import Fields, Price

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware, Link, Rates
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.planner.sizes import Sizes
    from lightning_largescale.workload import Divided, Segment, Step, Workload


# Numbers of a segment that a rank has a share of: as of its FLOPs, and as of the bytes that it saves.
_OF_FLOPS = ("forward_flops", "backward_flops")
_OF_BYTES = (
    "forward_moved_bytes",
    "backward_moved_bytes",
    "forward_large_bytes",
    "backward_large_bytes",
    "moved_product_bytes",
)


class TensorParallelPrice(Price):
    """Matrices of blocks sharded over the ranks of a node."""

    @override
    def rank_options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        yield {}
        if workload.whole:
            return
        for ranks, blocks in sorted(workload.divisions.items()):
            divides = any(found.parts for found in blocks.values())
            if ranks == 1 or not divides or hardware.world_size % ranks or ranks > hardware.ranks_per_node:
                continue
            yield {"tp": ranks}

    @override
    def options_on_ranks(self, workload: Workload, plan: Plan) -> Iterable[Fields]:
        yield {}
        found = workload.divisions.get(plan.tp, {}).values()
        if workload.stage == "fit" and any(one.sequence for one in found):
            yield {"sequence_parallel": True}

    @override
    def lay_out(self, sizes: GroupSizes) -> None:
        sizes.tensor_ranks = sizes.plan.tp
        for block, found in sizes.workload.divisions.get(sizes.plan.tp, {}).items():
            sizes.tensor_dims |= {f"{block}.{name}" if block else name: part.dim for name, part in found.parts.items()}

    @override
    def run(self, sizes: GroupSizes, step: Step) -> Step:
        costs = _costs(sizes)
        wraps = sizes.group_names - {*sizes.workload.blocks}
        return divided_step(step, costs, communicated_share(sizes.plan.matmul_dtype), wraps) if costs else step

    @override
    def seconds(self, sizes: Sizes, hardware: Hardware, rates: Rates) -> Mapping[str, float]:
        link = tensor_link(sizes.plan.tp, hardware, rates)
        return {"tensor parallel": sizes.accumulate * tensor_seconds(sizes, link)}

    @override
    def panel_rows(self, workload: Workload, plan: Plan) -> Iterable[tuple[str, str]]:
        return [("tensor parallel", division_words(workload, plan.tp))] if plan.tp > 1 else []


def divided_step(step: Step, costs: Mapping[str, Divided], share: float, wraps: Collection[str] = ()) -> Step:
    """Return `step` as one tensor-parallel rank runs it: it computes and saves a share of each sharded block.

    Temporaries of a block are assumed to be sharded as its saved activations are.

    Args:
        step: the step.
        costs: the division of each sharded block, by name; "" is the code outside of blocks.
        share: communicated bytes as a share of those that a division records, in float32.
        wraps: modules outside of blocks.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.
    """
    segments: list[Segment] = []
    # By how many bytes less is live before a segment, and after it.
    before = 0
    for segment in step.segments:
        found = costs.get("" if segment.block is None or segment.block in wraps else segment.block)
        saved_share, flops_share = (found.saved_share, found.flops_share) if found else (1.0, 1.0)
        saved = int(segment.saved_bytes * saved_share)
        after = before + segment.saved_bytes - saved
        inside = {
            f"{way}_peak_bytes": max(
                0,
                entry - less + int((getattr(segment, f"{way}_peak_bytes") - entry) * saved_share),
            )
            for way, entry, less in (
                ("forward", segment.forward_entry_bytes, before),
                ("backward", segment.backward_entry_bytes, after),
            )
        }
        scaled = {
            **{name: int(getattr(segment, name) * flops_share) for name in _OF_FLOPS},
            **{name: int(getattr(segment, name) * saved_share) for name in _OF_BYTES},
        }
        segments.append(
            replace(
                segment,
                **inside,  # type: ignore[arg-type]
                **scaled,  # type: ignore[arg-type]
                saved_bytes=saved,
                product_bytes=_kept_of_products(segment, found, share) if found else segment.product_bytes,
                forward_entry_bytes=max(0, segment.forward_entry_bytes - before),
                forward_exit_bytes=max(0, segment.forward_exit_bytes - after),
                backward_entry_bytes=max(0, segment.backward_entry_bytes - after),
                backward_exit_bytes=max(0, segment.backward_exit_bytes - before),
            )
        )
        before = after
    return replace(step, segments=tuple(segments), loss_peak_bytes=max(0, step.loss_peak_bytes - before))


def _kept_of_products(segment: Segment, found: Divided, share: float) -> int:
    """Return the bytes of matrix-product results that one rank still holds afterwards.

    All-reduces overwrite the results in place. Reduce-scatters do not, so their inputs stay, at full size.
    """
    scattered = int(share * sum(found.forward_halves)) // 2
    summed = int(share * sum(found.forward_reduced)) + scattered
    return int(max(0, segment.product_bytes - summed) * found.flops_share) + scattered


def tensor_seconds(sizes: Sizes, link: Link | None) -> float:
    """Return the seconds of tensor-parallel communication per micro-batch.

    Activations are communicated in forward, and again in recomputation; their gradients in backward.

    Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    costs = _costs(sizes)
    if not costs:
        return 0.0
    element = communicated_share(sizes.plan.matmul_dtype)
    summed: list[int] = []
    halves: list[int] = []
    trains = sizes.workload.stage == "fit"
    # The code outside of blocks counts once, however many segments it has.
    runs = [segment for segment in sizes.step.segments if segment.block is not None]
    for name, again in [("", False), *((segment.block or "", sizes.recomputes(segment)) for segment in runs)]:
        found = costs.get(name)
        if found is not None:
            times = 2 if trains and again else 1
            summed += found.forward_reduced * times + (found.backward_reduced if trains else ())
            halves += found.forward_halves * times + (found.backward_halves if trains else ())
    ranks = sizes.plan.tp
    seconds = sum(all_reduce_seconds(int(size * element), ranks, link) for size in summed)
    return seconds + sum(all_gather_seconds(int(size * element) // ranks, ranks, link) for size in halves)


def tensor_link(tp: int, hardware: Hardware, rates: Rates) -> Link | None:
    """Return the link of the innermost axis of the mesh, on consecutive ranks.

    Args:
        tp: the size of the axis.
        hardware: the hardware.
        rates: its rates.
    """
    node = hardware.ranks_per_node
    if hardware.nodes == 1:
        return rates.all_reduce
    if node % tp == 0:
        # The hops of an all-reduce are those of the other two.
        return rates.node_reduce_scatter or rates.node_all_gather or rates.all_reduce
    return shared(rates.all_reduce, 1 if tp % node == 0 else 2)


def communicated_share(dtype: str) -> float:
    """Return the factor from the float32 bytes that a `Divided` records as communicated to those in `dtype`."""
    return 0.5 if dtype in ("bfloat16", "float16") else 1.0


def division_words(workload: Workload, ranks: int) -> str:
    """Describe tensor parallelism over `ranks`: the share of all parameters sharded, and the replicated matrices."""
    found = workload.divisions.get(ranks, {})
    names = {f"{block}.{name}" if block else name for block, divided in found.items() for name in divided.parts}
    share = sum(one.numel for one in workload.parameters if one.name in names) / max(1, workload.numel)
    # Layer numbers become *, so that blocks that are alike are named once.
    whole: dict[str, str] = {}
    for block, divided in found.items():
        for name, why in divided.whole.items():
            whole.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{block}.{name}" if block else name), why)
    words = "; ".join(f"{name} ({why})" for name, why in whole.items())
    return f"{share:.1%} of the parameters divided" + (f"; whole: {words}" if words else "")


def _costs(sizes: GroupSizes) -> Mapping[str, Divided]:
    """Return the costs of each block that is sharded, by name; "" is the code outside of blocks."""
    return {
        block: (found.sequence if sizes.plan.sequence_parallel else None) or found
        for block, found in sizes.workload.divisions.get(sizes.plan.tp, {}).items()
    }
