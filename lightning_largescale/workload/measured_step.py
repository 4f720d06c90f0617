"""Measure a real step on one and two samples where fake tensors fail, and extrapolate linearly to the batch."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lightning_largescale.workload.batch import batch_bytes, batch_samples, first_samples, map_tensors
from lightning_largescale.workload.estimate import estimate
from lightning_largescale.workload.snapshot import swap_tensors
from lightning_largescale.workload.stand_in import attach
from lightning_largescale.workload.steps import Traced, TraceRequest, run_step
from lightning_largescale.workload.tracker import CannotTraceError
from lightning_largescale.workload.workload import Step, combine_steps

# Bytes up to which the full batch is run if no part of it can be: every machine has memory for such a step.
_SMALL_BATCH, _SMALL_STEP = 2**20, 2**28


def trace_on_samples(request: TraceRequest) -> Traced:
    """Run the step for real on one and on two samples and extrapolate to the batch; its last note says so.

    A step that accepts neither runs on the full batch, if that is small.

    Raises:
        CannotTraceError: a parameter or buffer is on the meta device, so the step cannot run.
        Exception: what the step raises on two samples, or on one if the batch has only one.
    """
    held = [*request.module.parameters(), *request.module.buffers()]
    if any(tensor.is_meta for tensor in held):
        raise CannotTraceError("its parameters have no values yet")
    # The step runs on the module's current device, which may differ from the requested one.
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
    """Run the step on one sample and on two, if it accepts them, or else on all; by number of samples."""
    runs: dict[int, Traced] = {}
    errors: list[Exception] = []
    for count in range(1, min(2, samples) + 1):
        try:
            runs[count] = trace_for_real(dataclasses.replace(request, batch=first_samples(request.batch, count)))
        except Exception as error:
            # Batch normalization, among others, refuses a single sample; then only the run on two counts.
            errors.append(error)
    # Flattened targets, or sizes that are hard-coded in the step, fit the full batch only.
    if not runs and samples > 2 and _is_small(request):
        runs[samples] = trace_for_real(request)
    if not runs:
        raise errors[-1]
    return runs


def _is_small(request: TraceRequest) -> bool:
    """Return whether the full batch surely fits in memory, its own bytes included."""
    # The estimate is unfit for convolutions, so large inputs are told by their own bytes.
    return batch_bytes(request.batch) <= _SMALL_BATCH and estimate(request, "").step.peak_bytes <= _SMALL_STEP


def trace_for_real(request: TraceRequest) -> Traced:
    """Run the step for real on the batch as it is; every tensor that it overwrites is restored."""

    def parameter(tensor: torch.Tensor) -> torch.Tensor:
        # The same data, without the gradients and the hooks that the user's parameters carry.
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    # What torch.compile wrapped runs as plain Python.
    with request.snapshot.untouched(), torch.compiler.set_stance("force_eager"):
        attach(request.module)
        new = swap_tensors(request.module, parameter, copied)
        batch = map_tensors(request.batch, copied)
        return run_step(dataclasses.replace(request, batch=batch), list(new.values()))


def _drawn_out(steps: dict[int, Step], samples: int) -> Step:
    """Extrapolate the measured steps, given by number of samples, to `samples`."""
    measured = [steps[count] for count in sorted(steps)]
    if len({tuple(segment.block for segment in step.segments) for step in measured}) == 1 and len(measured) == 2:
        return combine_steps(measured, lambda one, two: one + (two - one) * (samples - 1))
    count = max(steps)
    return combine_steps([steps[count]], lambda value: value * samples / count)
