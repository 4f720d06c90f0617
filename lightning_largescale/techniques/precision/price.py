"""Price of the arithmetic: which precisions the devices compute, and the step that was traced in one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_largescale.planner.price import Fields, Price
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE

if TYPE_CHECKING:
    from lightning_largescale.hardware import Hardware
    from lightning_largescale.plan import Plan
    from lightning_largescale.planner.group_sizes import GroupSizes
    from lightning_largescale.workload import Segment, Step, Workload


class PrecisionPrice(Price):
    """Arithmetic in fewer bits."""

    lossy = ("bf16-mixed",)

    @override
    def options(self, workload: Workload, hardware: Hardware, plan: Plan) -> Iterable[Fields]:
        return [{"precision": name} for name in workload.steps if _computes(hardware, name)]

    @override
    def impossible(self, workload: Workload, hardware: Hardware) -> Iterable[tuple[Fields, str]]:
        for name in workload.steps:
            if not _computes(hardware, name):
                why = f"{hardware.name} cannot compute matrix products in {MATMUL_TYPE[name]}"
                yield {"precision": name}, why

    @override
    def lossy_in(self, plan: Plan) -> Collection[str]:
        return {plan.precision} & {*self.lossy}

    @override
    def refusal(self, plan: Plan, allowed: Collection[str], *, fixed: bool) -> str:
        if plan.precision in allowed:
            return ""
        if plan.precision in self.lossy and not fixed:
            return f"{plan.precision} changes numerics and allow does not name it"
        return f"precision {plan.precision} is not {' or '.join(sorted(allowed))}, which was asked for"

    @override
    def lay_out(self, sizes: GroupSizes) -> None:
        sizes.step = sizes.workload.steps[sizes.plan.precision]
        sizes.halves = sizes.gathers and sizes.plan.precision in ("bf16-mixed", "16-mixed")

    @override
    def run(self, sizes: GroupSizes, step: Step) -> Step:
        return without_copies(step) if sizes.halves else step


def without_copies(step: Step) -> Step:
    """Return `step` as it runs if blocks all-gather matrices in the compute dtype, so that casts make no copies.

    Source: torch.distributed.fsdp.MixedPrecisionPolicy, `param_dtype`.
    """
    segments: list[Segment] = []
    before = 0
    for segment in step.segments:
        after = before + segment.saved_copy_bytes
        segments.append(
            dataclasses.replace(
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
    return dataclasses.replace(step, segments=tuple(segments), loss_peak_bytes=max(0, step.loss_peak_bytes - before))


def _computes(hardware: Hardware, precision: str) -> bool:
    return hardware.rates is not None and hardware.rates.matmul_rate(MATMUL_TYPE[precision]) is not None
