"""One step of a module as Lightning runs it, watched by the tracker, on whatever tensors the module holds."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_largescale import compat
from lightning_largescale.arithmetic import lightning_plugin
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE
from lightning_largescale.workload.batch import tensors_in
from lightning_largescale.workload.blocks import find_blocks, find_groups, find_wraps
from lightning_largescale.workload.reads import Reads
from lightning_largescale.workload.snapshot import Snapshot
from lightning_largescale.workload.tracker import CannotTraceError, Tracker
from lightning_largescale.workload.workload import Segment, Step

STAGES = {
    "training_step": "fit",
    "forward": "fit",
    "validation_step": "validate",
    "test_step": "test",
    "predict_step": "predict",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """A step to trace: the arguments of `Workload.trace`, with one precision.

    Attributes:
        snapshot: the snapshot of the module and the batch, restored after each run.
        watch_saved: whether autograd's saved tensors are watched.
    """

    module: nn.Module
    batch: Any
    step: str
    precision: str
    batch_idx: int
    device_type: str
    snapshot: Snapshot
    watch_saved: bool = True

    @property
    def trains(self) -> bool:
        """Return whether the step has a backward."""
        return STAGES[self.step] == "fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """The result of a run of the step.

    Attributes:
        step: the traced step.
        used: names of the parameters that received a gradient.
        wraps: names of the modules outside of blocks that may be all-gathered separately.
        approximate: why the numbers are not exact, a sentence each.
        branches: the step reads numbers off tensors.
    """

    step: Step
    used: frozenset[str]
    wraps: frozenset[str] = frozenset()
    approximate: tuple[str, ...] = ()
    branches: bool = False


def run_step(
    request: TraceRequest, swapped: list[torch.Tensor], to_fake: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Traced:
    """Run one step under a tracker; call within `Snapshot.untouched`, after `attach` and `swap_tensors`.

    Args:
        request: the request, with the batch to run on.
        swapped: the parameters and buffers that the module now holds.
        to_fake: makes a fake of a tensor from outside the step; None if the step runs on real tensors.
    """
    blocks = find_blocks(request.module)
    notes: list[str] = []
    tracker = Tracker(to_fake=to_fake)
    tracker.leave_out([*swapped, *tensors_in(request.batch)])
    tracker.tell_copies_of(_block_matrices(request.module))
    tracker.follow(_reads(request.module))
    try:
        with _safe_kernels(request.precision) if to_fake is None else contextlib.nullcontext():
            step = _run(request, tracker, blocks, notes)
    finally:
        tracker.put_back()
    used = frozenset(name for name, parameter in request.module.named_parameters() if id(parameter) in tracker.used)
    return Traced(step=step, used=used, wraps=tracker.reads.closed, approximate=tuple(notes))


def _run(request: TraceRequest, tracker: Tracker, blocks: dict[str, nn.Module], notes: list[str]) -> Step:
    module = request.module
    for parameter in module.parameters():
        parameter.grad = None
    with contextlib.ExitStack() as stack:
        if not request.trains:
            module.eval()
            stack.enter_context(torch.no_grad())
        stack.enter_context(tracker.watching(blocks, module.parameters(), saved=request.watch_saved))
        with lightning_plugin(request.precision, request.device_type).forward_context():
            result = call_step(request)
        output_bytes = tracker.storage_bytes(tensors_in(result))
        if request.trains and getattr(module, "automatic_optimization", True):
            loss = _loss(result, module)
            if loss is None:
                notes.append(f"{request.step} returned None, so only its forward was traced")
            else:
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
    tracker.finish()
    if not request.watch_saved:
        tracker.log.assume_saved()
        notes.append("the step forbids hooks on saved tensors; what each forward left alive counts as saved")
    if tracker.values_read:
        notes.append(f"{request.step} reads numbers off tensors; it was traced as if each were 1.0")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return _step(request.precision, tracker, blocks, names, output_bytes)


def _block_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the matrices that repeated blocks own, which FSDP all-gathers in the compute dtype."""
    own = [
        module.get_parameter(name) for block, group in find_groups(module).items() if block for name in group.parameters
    ]
    return [parameter for parameter in own if parameter.dim() > 1]


def _reads(module: nn.Module) -> Reads:
    """Return the watcher that finds which modules outside of blocks may be all-gathered separately."""
    wraps = find_wraps(module)
    groups = find_groups(module, wraps)
    return Reads(wraps, {name: [module.get_parameter(own) for own in groups[name].parameters] for name in wraps})


def _step(
    precision: str, tracker: Tracker, blocks: Collection[str], names: Mapping[int, str], output_bytes: int
) -> Step:
    segments = tracker.log.finished(names)
    tail: list[Segment] = []
    for segment in reversed(segments):
        if segment.block in blocks:
            break
        tail.append(segment)
    return Step(
        precision=precision,
        segments=segments,
        largest_temporary_bytes=tracker.largest_temporary,
        loss_peak_bytes=max((max(s.forward_peak_bytes, s.backward_peak_bytes) for s in tail), default=0),
        output_bytes=output_bytes,
    )


def call_step(request: TraceRequest) -> Any:
    """Call the step as Lightning does, and return its result."""
    hook = getattr(request.module, request.step, None)
    if request.step == "forward" or hook is None or not isinstance(request.module, LightningModule):
        return _forward(request.module, request.batch)
    parameters = inspect.signature(hook).parameters
    if "dataloader_iter" in parameters:
        return hook(iter([(request.batch, request.batch_idx, 0)]))
    arguments = [request.batch]
    if "batch_idx" in parameters or len(parameters) > 1:
        arguments.append(request.batch_idx)
    more = parameters.get("dataloader_idx")
    if more is not None and more.default is inspect.Parameter.empty:
        arguments.append(0)
    return hook(*arguments)


def _forward(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (list, tuple)) else module(batch)


def _loss(result: Any, module: nn.Module) -> torch.Tensor | None:
    if isinstance(result, torch.Tensor) and result.dim() == 0:
        return result
    if isinstance(result, Mapping) and isinstance(result.get("loss"), torch.Tensor):
        loss: torch.Tensor = result["loss"]
        return loss
    floating = [tensor for tensor in tensors_in(result) if tensor.is_floating_point() and tensor.requires_grad]
    if not floating:
        return None
    return torch.stack([tensor.sum().float() for tensor in floating]).sum()


def _safe_kernels(precision: str) -> Any:
    """Disable oneDNN for bfloat16: on some virtual machines its kernels use instructions that end the process."""
    if MATMUL_TYPE[precision] == "bfloat16":
        return torch.backends.mkldnn.flags(enabled=False)
    return contextlib.nullcontext()


def in_words(error: Exception) -> str:
    """Describe an error by type and first line; `CannotTraceError` and missing values of fakes in plainer words."""
    if isinstance(error, CannotTraceError):
        return str(error)
    if isinstance(error, compat.data_dependent_errors()):
        return f"it needs the values of tensors: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")
