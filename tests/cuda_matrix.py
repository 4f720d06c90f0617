"""What the ranks of test_cuda_matrix run: plans, and what is done under each, on any accelerator."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from callbacks.averages import KINDS, NOISE
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from models import DIM, Language, SaveLast, Tokens, trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_largescale.errors import PlanError
from lightning_largescale.groups import leave_process_group
from lightning_largescale.offload import pages
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

STEPS = 4  # in an epoch
GLOBAL_BATCH = 8
# The batch size that is found, and the one above it that a rank has no memory for.
FITS, TOO_LARGE = 4, 8
# Matrices, a rank's shards of them and what is saved for backward are 64 KiB or larger: nothing is too small to leave.
INNER = 2048
# No more than a few matrices.
PAGE_BYTES = 256 * 2**10

NVME = {"offload_parameters": "nvme", "offload_optimizer": "nvme", "offload_activations": "nvme"}
DRAM = dict.fromkeys(NVME, "cpu")
TIERS: dict[str, dict[str, Any]] = {
    "optimizer in DRAM": {"offload_optimizer": "cpu"},
    "optimizer on disk": {"offload_optimizer": "nvme", "resident_optimizer_bytes": 300_000},
    "host step": {"offload_optimizer": "cpu", "cpu_optimizer_step": True},
    "host step from disk": {"offload_optimizer": "nvme", "cpu_optimizer_step": True},
    "parameters in DRAM": {"offload_parameters": "cpu"},
    "parameters on disk": {"offload_parameters": "nvme"},
    "activations in DRAM": {"offload_activations": "cpu"},
    "activations on disk": {"offload_activations": "nvme"},
    "all in DRAM": DRAM,
    "all on disk": NVME,
    "three tiers": {
        **NVME,
        "resident_parameter_bytes": 300_000,
        "cpu_parameter_bytes": 300_000,
        "resident_optimizer_bytes": 600_000,
        "cpu_optimizer_bytes": 600_000,
    },
    "release": {"release_gradients": True},
    "release and host step": {"release_gradients": True, "offload_optimizer": "cpu", "cpu_optimizer_step": True},
    "release, all on disk": {"release_gradients": True, "activation_checkpointing": "full", **NVME},
}
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"activation_checkpointing": "full"},
    "recompute in part": {
        "activation_checkpointing": "selective",
        "checkpointed_blocks": ("blocks.0", "blocks.2"),
        "checkpointed_operations": "cheap",
    },
    **TIERS,
    "16-mixed": {"precision": "16-mixed"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed, all in DRAM": {"precision": "16-mixed", **DRAM},
    "bf16-mixed, all on disk": {"precision": "bf16-mixed", **NVME},
}
SHARDED = {f"ZeRO-3, {name}": {"dp_shard": 2, **fields} for name, fields in ALONE.items() if name != "plain"}
TABLE = {"row_sharded_embeddings": ("embedding",)}
PAIRED: dict[str, dict[str, Any]] = {
    "replicate": {"dp_replicate": 2},
    "replicate, optimizer in DRAM": {"dp_replicate": 2, "offload_optimizer": "cpu"},
    "ZeRO-2": {"dp_shard": 2, "reshard_after_forward": False},
    "ZeRO-2, all in DRAM": {"dp_shard": 2, "reshard_after_forward": False, **DRAM},
    "ZeRO-3": {"dp_shard": 2, "extra_fsdp_modules": ("embedding", "head")},
    **SHARDED,
    "tp": {"tp": 2},
    "tp, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "tp, all in DRAM": {"tp": 2, **DRAM},
    "table beside replicas": {"dp_replicate": 2, **TABLE},
    "table beside shards": {"dp_shard": 2, **TABLE},
}
FOUR: dict[str, dict[str, Any]] = {
    "HSDP": {"dp_replicate": 2, "dp_shard": 2},
    "2D": {"dp_shard": 2, "tp": 2},
    "2D, all in DRAM": {"dp_shard": 2, "tp": 2, **DRAM},
}
PLANS = {**ALONE, **PAIRED, **FOUR}
# By the names of their plans; inductor makes no code for a pretended device.
AOT = {"backend": "aot_eager"}
COMPILED = (
    "plain",
    "recompute",
    "recompute in part",
    "optimizer in DRAM",
    "host step from disk",
    "parameters in DRAM",
    "parameters on disk",
    "activations in DRAM",
    "all on disk",
    "release",
    "16-mixed",
    "bf16-mixed",
    "replicate",
    "ZeRO-2",
    "ZeRO-3",
    "ZeRO-3, recompute",
    "ZeRO-3, all in DRAM",
    "ZeRO-3, release",
    "ZeRO-3, bf16-mixed",
    "table beside shards",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how something is run.

    Attributes:
        plan: None: by stock Lightning in `precision`.
        compiled: each block is compiled, by a backend that runs on a pretended device.
        folder: for checkpoints and spilled tensors; shared by the ranks.
        sparse: the optimizer is one that takes the sparse gradients of a table.
    """

    accelerator: str
    folder: Path
    plan: Plan | None = None
    precision: str = "32-true"
    sparse: bool = False
    batch_size: int | None = None
    compiled: bool = False

    def trainer(self, *, save_full: bool = False, **options: Any) -> Trainer:
        """A Trainer here."""
        given = {"accelerator": self.accelerator, "max_steps": -1, "max_epochs": 1, "default_root_dir": self.folder}
        options = {**given, **options}
        if self.plan is None:
            # On the CPU Lightning takes "16-mixed" as a plugin only.
            half = self.precision == "16-mixed"
            given = {"plugins": [MixedPrecision("16-mixed", "cpu")]} if half else {"precision": self.precision}
            return trainer(**given, **options)
        strategy = LargeScaleStrategy(self.plan, save_full=save_full, compile=self.compiled and AOT)
        return trainer(strategy, devices=self.plan.world_size, **options)


class Block(nn.Module):
    """A perceptron that is wide within."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up, self.down = nn.Linear(DIM, INNER), nn.Linear(INNER, DIM)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(Language):
    """A language model that never waits for the device in a step: what is late stays late.

    Args:
        sparse: as of a Place.
        by_hand: it optimizes by itself, every second step.
        batch_size: a rank's; None: its share of the global batch.
        short: a rank that has no memory for batches of TOO_LARGE.
    """

    def __init__(self, *, sparse, seed=0, by_hand=False, batch_size=None, short=None):
        super().__init__(seed=seed, samples=STEPS * GLOBAL_BATCH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.automatic_optimization = not by_hand
        self.sparse, self.batch_size, self.short = sparse, batch_size, short
        self.blocks[1].register_full_backward_pre_hook(lambda part, gradients: self.run_out(gradients[0]))

    def run_out(self, gradient):
        if len(gradient) >= TOO_LARGE and self.global_rank == self.short:
            torch.empty(1 << 50, device=gradient.device)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.losses.append(self.all_gather(loss.detach()).mean())
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.differentiate(loss)
        if index % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
        return None

    def differentiate(self, loss):
        self.manual_backward(loss)

    def validation_step(self, batch, index):
        loss = self.loss(batch)
        self.evaluated.append(self.all_gather(loss).mean())
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        if self.sparse:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        # Adam makes steps out of rounding where a gradient is nearly none.
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)

    def loader(self):
        among = (self.trainer.distributed_sampler_kwargs or {}) if self.trainer.world_size > 1 else {}
        data, size = Tokens(self.samples), self.batch_size or GLOBAL_BATCH // among.get("num_replicas", 1)
        return DataLoader(
            data, batch_size=size, sampler=DistributedSampler(data, shuffle=False, **among) if among else None
        )

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Assigns(Model):
    """Sets gradients, in the step and after it."""

    def differentiate(self, loss):
        parameters = [*self.parameters()]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad = parameter.grad * 0.5


Outcome = dict[str, Any]


def numbers(model: Model, fitted: Trainer) -> Outcome:
    """Losses, evaluations and weights, on the CPU."""
    found = {"losses": _plain(model.losses), "evaluated": _plain(model.evaluated)}
    whole = getattr(fitted.strategy, "full_parameters", contextlib.nullcontext)
    with whole():
        return {**found, "weights": {name: _dense(one) for name, one in model.state_dict().items()}}


def _plain(values):
    return [float(one) for one in values]


def _dense(tensor):
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def fits(place: Place) -> Outcome:
    """With validation on the way."""
    model, fitted = Model(sparse=place.sparse), place.trainer(limit_val_batches=2, val_check_interval=2)
    fitted.fit(model)
    return numbers(model, fitted)


def evaluates(place: Place) -> Outcome:
    """Without a fit, and after one by the same Trainer."""
    model, fitted = Model(sparse=place.sparse), place.trainer(limit_val_batches=2, max_epochs=-1, max_steps=2)
    fitted.validate(model, verbose=False)
    predicted = fitted.predict(model)
    fitted.fit(model)
    fitted.test(model, verbose=False)
    found = numbers(model, fitted)
    if place.plan is None or place.plan.dp == 1:
        found["predicted"] = [one.cpu() for one in predicted]
    return found


def resumes(place: Place, *, save_full: bool = False) -> Outcome:
    """A fit of an epoch, and another model's from its checkpoint."""
    path = place.folder / "after.ckpt"
    first = Model(sparse=place.sparse)
    place.trainer(callbacks=[SaveLast(path)], save_full=save_full).fit(first)
    second = Model(sparse=place.sparse, seed=1)
    fitted = place.trainer(max_epochs=2, save_full=save_full)
    fitted.fit(second, ckpt_path=path, weights_only=False)
    return {"first": _plain(first.losses), **numbers(second, fitted)}


def saves_a_file(place: Place) -> Outcome:
    """What `save_full` writes is a file as stock Lightning's, and read again."""
    found = resumes(place, save_full=True)
    assert (place.folder / "after.ckpt").is_file()
    saved = torch.load(place.folder / "after.ckpt", map_location="cpu", weights_only=False)
    state = saved["optimizer_states"][0]["state"]
    found["saved"] = {name: _dense(one) for name, one in saved["state_dict"].items()}
    found["state"] = {key: {name: _dense(one) for name, one in values.items()} for key, values in state.items()}
    return found


def averages(kind: str) -> Callable[[Place], Outcome]:
    def run(place: Place) -> Outcome:
        model, callback = Model(sparse=place.sparse), KINDS[kind]()
        fitted = place.trainer(max_epochs=3, limit_train_batches=2, limit_val_batches=1, callbacks=[callback])
        fitted.fit(model)
        return numbers(model, fitted)

    return run


def clips(algorithm: str, bound: float) -> Callable[[Place], Outcome]:
    def run(place: Place) -> Outcome:
        model = Model(sparse=place.sparse)
        options = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
        fitted = place.trainer(accumulate_grad_batches=2, **options)
        fitted.fit(model)
        return numbers(model, fitted)

    return run


def by_hand(assigns: bool) -> Callable[[Place], Outcome]:
    def run(place: Place) -> Outcome:
        # Rows of tables have gradients of their own, and GradScaler takes those of its own backward.
        sets = assigns and not place.sparse and place.precision != "16-mixed"
        model = (Assigns if sets else Model)(sparse=place.sparse, by_hand=True)
        fitted = place.trainer()
        fitted.fit(model)
        return numbers(model, fitted)

    return run


def fits_twice(place: Place) -> Outcome:
    """The same model, an evaluation between."""
    model = Model(sparse=place.sparse)
    for _ in range(2):
        fitted = place.trainer(limit_val_batches=1)
        fitted.fit(model)
        fitted.validate(model, verbose=False)
    return numbers(model, fitted)


def finds_a_batch_size(place: Place) -> Outcome:
    """One rank has no memory for the larger; stock Lightning is given what is to be found."""
    if place.plan is None:
        model, fitted = Model(sparse=place.sparse, batch_size=place.batch_size), place.trainer(max_epochs=1)
        found = FITS
        fitted.fit(model)
    else:
        model = Model(sparse=place.sparse, batch_size=2, short=place.plan.world_size - 1)
        finder = BatchSizeFinder(init_val=2, steps_per_trial=2, max_trials=4, margin=0.0)
        fitted = place.trainer(max_epochs=1, callbacks=[finder])
        # Of trials.
        model.on_fit_start = lambda: (model.losses.clear(), model.evaluated.clear())
        fitted.fit(model)
        found = finder.optimal_batch_size
    return {"found": found, "size": FITS if place.plan is None else model.batch_size, **numbers(model, fitted)}


ACTIONS: dict[str, Callable[[Place], Outcome]] = {
    "fit": fits,
    "validate": evaluates,
    "resume": resumes,
    "save_full": saves_a_file,
    "swa": averages("swa"),
    "ema": averages("ema"),
    "clipping": clips("norm", 0.05),
    "clipping by value": clips("value", 0.002),
    "by hand": by_hand(False),
    "gradients by hand": by_hand(True),
    "second fit": fits_twice,
    "batch size": finds_a_batch_size,
}


def play(action: str, place: Place) -> Outcome | str:
    """The action's outcome on this rank; the sentence by which it is refused."""
    # Each connects its ranks as its plan wants it.
    leave_process_group()
    # What was compiled before is kept otherwise, up to a limit beyond which nothing is compiled.
    torch.compiler.reset()
    with _small_pages(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"{NOISE}|GPU available but not used")
        try:
            return ACTIONS[action](place)
        except PlanError as error:
            return str(error)


@contextlib.contextmanager
def _small_pages() -> Iterator[None]:
    before, pages.PAGE_BYTES = pages.PAGE_BYTES, PAGE_BYTES
    try:
        yield
    finally:
        pages.PAGE_BYTES = before
