"""`Workload.trace`: the step on fake tensors; failing that a real step on samples; failing that an estimate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_largescale import compat
from lightning_largescale.arithmetic import STORED_TYPE, lightning_plugin
from lightning_largescale.errors import PlanError
from lightning_largescale.techniques.precision.fields import MATMUL_TYPE
from lightning_largescale.workload.batch import batch_bytes, batch_samples, map_tensors, tensor_bytes, tensors_in
from lightning_largescale.workload.blocks import find_blocks, find_groups, find_wraps
from lightning_largescale.workload.divisions import divide_blocks
from lightning_largescale.workload.estimate import estimate
from lightning_largescale.workload.keep import MOST_OBJECTS
from lightning_largescale.workload.kinds import find_lazy, lazy_error, why_whole
from lightning_largescale.workload.measured_step import trace_on_samples
from lightning_largescale.workload.metrics import forgive_metrics
from lightning_largescale.workload.optimizer_needs import assumed_needs, optimizer_needs
from lightning_largescale.workload.snapshot import Snapshot, has_script, swap_tensors
from lightning_largescale.workload.stand_in import attach, optimizers_of
from lightning_largescale.workload.steps import STAGES, Traced, TraceRequest, in_words, run_step
from lightning_largescale.workload.tracker import CannotTraceError
from lightning_largescale.workload.workload import Divided, OptimizerNeeds, Parameter, Workload, only_blocks

# Limit on the objects below attributes of modules that are restored between isolated runs.
_NEAR_OBJECTS = 1000


def trace_workload(
    module: nn.Module,
    batch: Any,
    *,
    step: str,
    precisions: tuple[str, ...],
    device_type: str,
    batch_idx: int = 0,
    ask: bool = True,
    tp_sizes: tuple[int, ...] = (),
    isolated: bool = False,
) -> Workload:
    """Implement `Workload.trace`, which documents arguments, result and errors.

    Without a batch and `ask`, no code of the module is called, and two states a parameter are assumed. If `isolated`,
    the caller discards all effects of the runs; between them only objects near the modules are restored.
    """
    _check(module, step, precisions)
    snapshot = Snapshot(module, batch, most_objects=_NEAR_OBJECTS if isolated else MOST_OBJECTS)
    requests = {
        precision: TraceRequest(
            module=module,
            batch=lightning_plugin(precision, device_type).convert_input(batch),
            step=step,
            precision=precision,
            batch_idx=batch_idx,
            device_type=device_type,
            snapshot=snapshot,
        )
        for precision in precisions
    }
    with warnings.catch_warnings():
        # The real run repeats the warnings of the step.
        warnings.simplefilter("ignore")
        traced, left_out = _traced(requests)
        used = frozenset(name for one in traced.values() for name in one.used)
        wraps = frozenset.intersection(*(one.wraps for one in traced.values()))
        optimizers, notes = _optimizers(next(iter(requests.values())), used, ask=ask)
        divisions = _divisions(next(iter(requests.values())), tp_sizes)
    blocks = tuple(find_blocks(module))
    return Workload(
        name=type(compat.compiled_module(module)).__name__,
        parameters=_parameters(module, used, wraps),
        buffer_bytes=sum(map(tensor_bytes, module.buffers())),
        optimizers=optimizers,
        steps={precision: only_blocks(one.step, {*blocks, *wraps}) for precision, one in traced.items()},
        batch_samples=batch_samples(batch),
        batch_bytes=batch_bytes(batch),
        blocks=blocks,
        wraps=tuple(name for name in find_wraps(module) if name in wraps),
        divisions=divisions,
        stage=STAGES[step],
        branches=any(one.branches for one in traced.values()),
        whole=why_whole(module),
        approximate=(*_said(traced), *left_out, *notes, *_of_the_batch(batch)),
    )


def _check(module: nn.Module, step: str, precisions: Sequence[str]) -> None:
    if step not in STAGES:
        raise PlanError(f"step={step!r} cannot be traced; give one of {', '.join(map(repr, STAGES))}.")
    accepted = ", ".join(map(repr, MATMUL_TYPE))
    if not precisions:
        raise PlanError(f"precisions is empty; give one or more of {accepted}.")
    for precision in precisions:
        if precision not in MATMUL_TYPE:
            raise PlanError(f"precision={precision!r} cannot be traced; give one of {accepted}.")
        stored = STORED_TYPE.get(precision)
        if stored is not None and stored not in {parameter.dtype for parameter in module.parameters()}:
            raise PlanError(
                f"precision={precision!r} is traced on a module of {MATMUL_TYPE[precision]} parameters and"
                f" {type(module).__name__} has none; convert it first, with module.to({stored})."
            )
    if (name := find_lazy(module)) is not None:
        raise lazy_error(name)


def _traced(requests: Mapping[str, TraceRequest]) -> tuple[dict[str, Traced], list[str]]:
    """Trace the step in each precision, with a sentence on each in which it cannot run; if none runs, estimate all."""
    traced: dict[str, Traced] = {}
    failed: dict[str, str] = {}
    for precision, request in requests.items():
        if request.batch is None:
            failed[precision] = "there was no batch to trace with"
            continue
        try:
            traced[precision] = _run(request)
        except CannotTraceError as error:
            failed[precision] = str(error)
    if not traced:
        return {precision: estimate(requests[precision], why) for precision, why in failed.items()}, []
    return traced, [f"{precision} is left out, since {why}" for precision, why in failed.items()]


def _run(request: TraceRequest) -> Traced:
    """Run the step on fakes, or else on samples.

    Raises:
        CannotTraceError: the step runs on neither; the error says why.
    """
    try:
        try:
            return _trace_on_fakes(request)
        except RuntimeError as error:
            # The message of functorch's transforms, and of code that disables these hooks.
            if "saved tensor hooks" not in str(error):
                raise
            request = replace(request, watch_saved=False)
            return _trace_on_fakes(request)
    except Exception as error:
        why = f"{request.step} cannot run on fake tensors ({in_words(error)})"
        branches = isinstance(error, compat.data_dependent_errors())
    try:
        traced = trace_on_samples(request)
    except Exception as error:
        raise CannotTraceError(f"{why}, nor on one sample ({in_words(error)})") from error
    told = f"{why}: {traced.approximate[-1]}"
    return replace(traced, branches=branches, approximate=(told, *traced.approximate[:-1]))


def _said(traced: Mapping[str, Traced]) -> list[str]:
    """Return the notes of all precisions, each once; a note that does not hold for all names its precisions."""
    notes: dict[str, list[str]] = {}
    for precision, one in traced.items():
        for note in dict.fromkeys(one.approximate):
            notes.setdefault(note, []).append(precision)
    return [
        note if len(precisions) == len(traced) else f"{' and '.join(precisions)}: {note}"
        for note, precisions in notes.items()
    ]


def _of_the_batch(batch: Any) -> list[str]:
    if batch is None or tensors_in(batch) or (isinstance(batch, Sized) and not len(batch)):
        return []
    return [f"no tensor was found in the batch, a {type(batch).__name__}, so its samples and bytes are not known"]


class _Fakes:
    """Makes fakes of tensors: same shapes, dtypes and strides, on the request's device, without data."""

    def __init__(self, device_type: str) -> None:
        self.mode = compat.fake_tensor_mode()
        # A build without CUDA cannot make CUDA tensors, not even fakes; the CPU's shapes and bytes are nearly the same.
        self.device_type = device_type if device_type != "cuda" or torch.cuda.is_available() else "cpu"
        self.notes = [] if self.device_type == device_type else ["there is no CUDA here: CPU kernels were traced"]

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_nested or tensor.is_quantized or compat.is_wrapper(tensor):
            self.notes.append("tensors of classes and layouts of which there are no fakes were traced as they are")
            return tensor
        if tensor.layout is not torch.strided:
            # A sparse fake has no elements, whatever the tensor has.
            self.notes.append("sparse tensors were traced as dense ones, whose operations need more")
        with self.mode:
            strides = tensor.stride() if tensor.layout is torch.strided else torch.empty(tensor.shape).stride()
            made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=self.device_type)
            return made.requires_grad_(tensor.requires_grad and tensor.is_leaf)

    def parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        made = nn.Parameter(self.tensor(tensor.detach()), requires_grad=tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)
        return made


@contextmanager
def _holding_fakes(request: TraceRequest) -> Iterator[tuple[_Fakes, list[torch.Tensor]]]:
    """Context in which the module holds fakes, which are yielded, and a stand-in trainer; new tensors are fakes too."""
    fakes = _Fakes(request.device_type)
    # What torch.compile wrapped runs as plain Python.
    with request.snapshot.untouched(), torch.compiler.set_stance("force_eager"), compat.silent_fakes():
        attach(request.module)
        new = swap_tensors(request.module, fakes.parameter, fakes.tensor)
        with fakes.mode:
            yield fakes, list(new.values())


def _trace_on_fakes(request: TraceRequest) -> Traced:
    if has_script(request.module):
        raise CannotTraceError("TorchScript runs parts of it, and may read their addresses")
    with _holding_fakes(request) as (fakes, swapped):
        passed_over = forgive_metrics(request.module)
        batch = map_tensors(request.batch, fakes.tensor)
        on_fakes = replace(request, batch=batch, device_type=fakes.device_type)
        traced = run_step(on_fakes, swapped, fakes.mode.from_tensor)
    return replace(traced, approximate=(*traced.approximate, *passed_over, *fakes.notes))


def _optimizers(
    request: TraceRequest, used: frozenset[str], *, ask: bool
) -> tuple[tuple[OptimizerNeeds, ...], tuple[str, ...]]:
    """Return the needs of the module's optimizers, and notes about them."""
    module = request.module
    if not (request.trains and isinstance(module, LightningModule)):
        return (), ()
    notes: list[str] = []
    sizes = {name: tensor_bytes(p) for name, p in module.named_parameters() if p.requires_grad}
    if not ask:
        return (assumed_needs("unknown", sizes),), ("two states a parameter are assumed",)
    with _holding_fakes(request) as (fakes, _):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        try:
            optimizers = _configured(module)
        except Exception as error:
            why = f"configure_optimizers could not be asked ({in_words(error)}), so two states a parameter are assumed"
            return (assumed_needs("unknown", sizes),), (why,)
        needs = [
            optimizer_needs(one, names, used, sizes, mode=fakes.mode, device_type=request.device_type, notes=notes)
            for one in optimizers
        ]
    return tuple(needs), tuple(notes)


def _divisions(request: TraceRequest, sizes: tuple[int, ...]) -> dict[int, dict[str, Divided]]:
    if not sizes or request.batch is None or has_script(request.module):
        return {}
    with _holding_fakes(request) as (fakes, _):
        forgive_metrics(request.module)
        batch = map_tensors(request.batch, fakes.tensor)
        return divide_blocks(replace(request, batch=batch, device_type=fakes.device_type), sizes, fakes.mode)


def _configured(module: LightningModule) -> list[Optimizer]:
    try:
        return optimizers_of(module.configure_optimizers())
    except compat.data_dependent_errors():
        # Tables that an optimizer computes at construction, such as those of 8-bit codes, can be real.
        with compat.without_dispatch_modes():
            return optimizers_of(module.configure_optimizers())


def _parameters(module: nn.Module, used: frozenset[str], wraps: frozenset[str]) -> tuple[Parameter, ...]:
    owner = {name: block for block, group in find_groups(module, wraps).items() for name in group.parameters}
    tables = {id(child.weight) for child in module.modules() if isinstance(child, (nn.Embedding, nn.EmbeddingBag))}
    names: dict[int, list[str]] = {}
    by_id: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        by_id[id(parameter)] = parameter
    return tuple(
        Parameter(
            name=aliases[0],
            shape=tuple(by_id[key].shape),
            dtype=str(by_id[key].dtype).removeprefix("torch."),
            bytes=tensor_bytes(by_id[key]),
            trainable=by_id[key].requires_grad,
            used=aliases[0] in used,
            block=owner[aliases[0]] or None,
            aliases=tuple(aliases[1:]),
            embedding=key in tables,
        )
        for key, aliases in names.items()
    )
