"""A real step on one sample, and on two, where fakes fail: a line through the two is read at the batch's size."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lightning_largescale.workload.batch import batch_bytes, batch_samples, first_samples, map_tensors
from lightning_largescale.workload.estimate import estimate
from lightning_largescale.workload.snapshot import swap_tensors
from lightning_largescale.workload.stand_in import attach
from lightning_largescale.workload.steps import Traced, TraceRequest, eager, run_step
from lightning_largescale.workload.tracker import CannotTraceError
from lightning_largescale.workload.workload import Step, combine_steps

# Up to these bytes a whole batch is run where no part of it can be: no machine misses a step of that size.
_SMALL_BATCH, _SMALL_STEP = 2**20, 2**28


def trace_on_samples(request: TraceRequest) -> Traced:
    """The step for real on one and on two samples, drawn out to the batch; the last of its notes says so.

    A step that takes neither runs on the whole batch, if that is small.

    Raises:
        CannotTraceError: a parameter has no data, so that there is nothing to run.
        Exception: what the step raises on two samples, or on one where the batch has no more.
    """
    held = [*request.module.parameters(), *request.module.buffers()]
    if any(tensor.is_meta for tensor in held):
        raise CannotTraceError("its parameters have no values yet")
    # The step runs where the module is now, before it moves to the device that is asked about.
    device_type = next((tensor.device.type for tensor in held), "cpu")
    where = "" if device_type == request.device_type else f" with kernels for {device_type}"
    request = dataclasses.replace(request, device_type=device_type)
    samples = batch_samples(request.batch)
    runs = _runs(request, samples)
    last = runs[max(runs)]
    step = _drawn_out({count: run.step for count, run in runs.items()}, samples)
    measured = " and ".join(map(str, runs))
    how = f"a real step was measured on {measured} of the {samples} samples{where} and drawn out to all"
    if samples in runs:
        how = f"a real step was measured on the batch of {samples}{where}"
    return dataclasses.replace(last, step=step, approximate=(*last.approximate, how))


def _runs(request: TraceRequest, samples: int) -> dict[int, Traced]:
    """The step on one sample and on two, as far as it takes them, or else on all; by their number."""
    runs: dict[int, Traced] = {}
    errors: list[Exception] = []
    for count in range(1, min(2, samples) + 1):
        try:
            runs[count] = trace_for_real(dataclasses.replace(request, batch=first_samples(request.batch, count)))
        except Exception as error:
            # A single sample is refused by batch normalisation, among others; then two stand for the batch.
            errors.append(error)
    # Targets that are flattened, or sizes that are written into the step, go with the whole batch only.
    if not runs and samples > 2 and _is_small(request):
        runs[samples] = trace_for_real(request)
    if not runs:
        raise errors[-1]
    return runs


def _is_small(request: TraceRequest) -> bool:
    """Whether the whole batch can be run without a thought to memory: of convolutions the estimate knows too little."""
    return batch_bytes(request.batch) <= _SMALL_BATCH and estimate(request, "").step.peak_bytes <= _SMALL_STEP


def trace_for_real(request: TraceRequest) -> Traced:
    """The step for real on the batch as it is; every tensor that it overwrites is put back."""

    def parameter(tensor: torch.Tensor) -> torch.Tensor:
        # The same data, without the gradients and the hooks that the user's parameters carry.
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    with request.snapshot.untouched(), eager():
        attach(request.module)
        new = swap_tensors(request.module, parameter, copied)
        batch = map_tensors(request.batch, copied)
        return run_step(dataclasses.replace(request, batch=batch), list(new.values()))


def _drawn_out(steps: dict[int, Step], samples: int) -> Step:
    """The step at `samples`, given those at 1, at 2 or at both."""
    measured = [steps[count] for count in sorted(steps)]
    if len({tuple(segment.block for segment in step.segments) for step in measured}) == 1 and len(measured) == 2:
        return combine_steps(measured, lambda one, two: one + (two - one) * (samples - 1))
    count = max(steps)
    return combine_steps([steps[count]], lambda value: value * samples / count)
