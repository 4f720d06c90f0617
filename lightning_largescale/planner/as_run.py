"""A traced step as one rank runs it under a plan: without weight copies, and sharded by tensor parallelism.

Source: torch.distributed.fsdp.MixedPrecisionPolicy; Korthikanti et al. 2022, "Reducing Activation Recomputation in
    Large Transformer Models", section 4.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lightning_largescale.techniques.precision.fields import MATMUL_TYPE
from lightning_largescale.workload import Divided, Segment, Step


def without_copies(step: Step) -> Step:
    """Return `step` as it runs if blocks all-gather matrices in the compute dtype, so that casts make no copies.

    Source: torch.distributed.fsdp.MixedPrecisionPolicy, `param_dtype`.
    """
    segments: list[Segment] = []
    before = 0
    for segment in step.segments:
        after = before + segment.saved_copy_bytes
        segments.append(
            replace(
                segment,
                forward_moved_bytes=segment.forward_moved_bytes - segment.moved_copy_bytes,
                saved_bytes=segment.saved_bytes - segment.saved_copy_bytes,
                forward_entry_bytes=max(0, segment.forward_entry_bytes - before),
                forward_peak_bytes=segment.forward_peak_bytes - segment.forward_copy_bytes,
                forward_exit_bytes=max(0, segment.forward_exit_bytes - after),
                backward_entry_bytes=max(0, segment.backward_entry_bytes - after),
                backward_peak_bytes=segment.backward_peak_bytes - segment.backward_copy_bytes,
                backward_exit_bytes=max(0, segment.backward_exit_bytes - before),
                saved_copy_bytes=0,
                forward_copy_bytes=0,
                backward_copy_bytes=0,
                moved_copy_bytes=0,
            )
        )
        before = after
    return replace(step, segments=tuple(segments), loss_peak_bytes=max(0, step.loss_peak_bytes - before))


def divided_step(step: Step, costs: Mapping[str, Divided], wraps: Collection[str] = ()) -> Step:
    """Return `step` as one tensor-parallel rank runs it: it computes and saves a share of each sharded block.

    The same holds for the code outside of blocks, `wraps` included. Temporaries of a block are assumed to be sharded as
    its saved activations are.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.
    """
    segments: list[Segment] = []
    # By how many bytes less is live before a segment, and after it.
    before = 0
    for segment in step.segments:
        found = costs.get("" if segment.block is None or segment.block in wraps else segment.block, Divided())
        saved = int(segment.saved_bytes * found.saved_share)
        after = before + segment.saved_bytes - saved
        inside = {
            f"{way}_peak_bytes": max(
                0,
                entry - less + int((getattr(segment, f"{way}_peak_bytes") - entry) * found.saved_share),
            )
            for way, entry, less in (
                ("forward", segment.forward_entry_bytes, before),
                ("backward", segment.backward_entry_bytes, after),
            )
        }
        scaled = {
            name: int(getattr(segment, name) * share)
            for share, names in (
                (found.flops_share, ("forward_flops", "backward_flops")),
                (
                    found.saved_share,
                    (
                        "forward_moved_bytes",
                        "backward_moved_bytes",
                        "forward_large_bytes",
                        "backward_large_bytes",
                        "moved_product_bytes",
                    ),
                ),
            )
            for name in names
        }
        segments.append(
            replace(
                segment,
                **inside,  # type: ignore[arg-type]
                **scaled,  # type: ignore[arg-type]
                saved_bytes=saved,
                product_bytes=_kept_of_products(segment, found, step.precision),
                forward_entry_bytes=max(0, segment.forward_entry_bytes - before),
                forward_exit_bytes=max(0, segment.forward_exit_bytes - after),
                backward_entry_bytes=max(0, segment.backward_entry_bytes - after),
                backward_exit_bytes=max(0, segment.backward_exit_bytes - before),
            )
        )
        before = after
    return replace(step, segments=tuple(segments), loss_peak_bytes=max(0, step.loss_peak_bytes - before))


def communicated_share(precision: str) -> float:
    """Return the factor from the float32 bytes that a `Divided` records as communicated to those in `precision`."""
    return 0.5 if precision != "32-true" and MATMUL_TYPE[precision] != "float64" else 1.0


def _kept_of_products(segment: Segment, found: Divided, precision: str) -> int:
    """Return the bytes of matrix-product results that one rank still holds afterwards.

    All-reduces overwrite the results in place. Reduce-scatters do not, so their inputs stay, at full size.
    """
    share = communicated_share(precision)
    scattered = int(share * sum(found.forward_halves)) // 2
    summed = int(share * sum(found.forward_reduced)) + scattered
    return int(max(0, segment.product_bytes - summed) * found.flops_share) + scattered
