"""What ranks of test_matrix run: each case trains with a callback, and returns what the callback has brought about."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.loggers.logger import Logger
from models import GLOBAL_BATCH, Block, Language, Tokens, read_checkpoint, trainer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import prune

from lightning_largescale.strategy import LargeScaleStrategy

STEPS, EPOCHS = 4, 3
# What Lightning advises in runs of this size.
NOISE = (
    "Checkpoint directory|The dirpath has changed|.*without a model|.*no last checkpoint|.*flops_per_batch|"
    ".*log_every_n_steps|.*resum|.*max_epochs|.*LearningRateMonitor"
)


class Memory(Logger):
    """Keeps what is logged, on rank 0 as loggers do."""

    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        if int(os.environ.get("RANK", 0)) == 0:
            self.metrics.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *_, **__):
        pass

    def logged(self, prefix=""):
        return [{name: value for name, value in row.items() if name.startswith(prefix)} for _, row in self.metrics]


class Student(Language):
    """Trained by plain gradient descent, on an epoch of a few steps."""

    def __init__(self, samples=STEPS * GLOBAL_BATCH, **options):
        super().__init__(seed=int(os.environ.get("RANK", 0)), layers=2, samples=samples, lr=0.2, **options)

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        # Worse in the third epoch, by itself.
        self.log("score", float(abs(self.current_epoch - 1)), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Fails(Student):
    def training_step(self, batch, index):
        if self.global_step == 3:
            raise ArithmeticError("a step that fails on every rank")
        return super().training_step(batch, index)


class Tuned(Student):
    """A backbone that is frozen at first."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Block(), Block())

    def forward(self, tokens):
        return super().forward(tokens) + self.backbone(self.embedding(tokens))

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def run(plan, devices, *given, model=None, caught=(), **options):
    """The module and the trainer after a fit with the callbacks `given`."""
    module = Student() if model is None else model
    made = trainer(
        plan if plan is None or isinstance(plan, str) else LargeScaleStrategy(plan),
        devices=devices,
        callbacks=list(given),
        **{"max_epochs": EPOCHS, "max_steps": -1, "limit_val_batches": 2, **options},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        with contextlib.suppress(*caught):
            made.fit(module)
    return module, made


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def keeps(plan, devices, folder, options, **run_options):
    """Which files a ModelCheckpoint leaves, what it thinks of them, and what is in the last written."""
    keeper = callbacks.ModelCheckpoint(folder, **options)
    run(plan, devices, keeper, enable_checkpointing=True, **run_options)
    files = names(folder)
    content = read_checkpoint(Path(folder) / files[-1])
    return {
        "files": files,
        "best": Path(keeper.best_model_path).name,
        "score": None if keeper.best_model_score is None else float(keeper.best_model_score),
        "last": Path(keeper.last_model_path).name,
        "keys": sorted(content),
        "step": content["global_step"],
        "weights": {name: weight.double().norm().item() for name, weight in content["state_dict"].items()},
    }


def checkpoint_top(plan, devices, folder):
    options = {"monitor": "score", "save_top_k": 2, "save_last": True, "filename": "{epoch}-{score:.1f}"}
    return keeps(plan, devices, folder, options)


def checkpoint_steps(plan, devices, folder):
    return keeps(plan, devices, folder, {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step:02d}"})


def checkpoint_epochs(plan, devices, folder):
    return keeps(plan, devices, folder, {"every_n_epochs": 2, "save_weights_only": True, "filename": "{epoch}"})


def checkpoint_time(plan, devices, folder):
    options = {"train_time_interval": timedelta(microseconds=1), "save_top_k": -1, "filename": "{step:02d}"}
    return keeps(plan, devices, folder, options)


def checkpoint_linked_last(plan, devices, folder):
    return keeps(plan, devices, folder, {"save_last": "link", "monitor": "val_loss", "filename": "{epoch}"})


def checkpoint_exception(plan, devices, folder):
    options = {"save_on_exception": True, "filename": "{step}"}
    return keeps(plan, devices, folder, options, model=Fails(), caught=[ArithmeticError])


class Keeps(callbacks.OnExceptionCheckpoint):
    """Lightning's removes its file when the trainer tears down."""

    def teardown(self, *_, **__):
        pass


def exception_checkpoint(plan, devices, folder):
    run(plan, devices, Keeps(folder, "failed"), model=Fails(), caught=[ArithmeticError], enable_checkpointing=True)
    content = read_checkpoint(Path(folder) / "failed.ckpt")
    weights = {name: weight.double().norm().item() for name, weight in content["state_dict"].items()}
    return {
        "step": content["global_step"],
        "weights": weights,
        "optimizers": len(content["optimizer_states"][0]["state"]),
    }


def early_stopping(plan, devices, folder):
    stops = callbacks.EarlyStopping("score", patience=1)
    module, made = run(plan, devices, stops, max_epochs=8)
    return {
        "epoch": stops.stopped_epoch,
        "best": float(stops.best_score),
        "steps": made.global_step,
        "losses": module.losses,
    }


def early_stopping_threshold(plan, devices, folder):
    stops = callbacks.EarlyStopping("val_loss", stopping_threshold=3.28)
    _, made = run(plan, devices, stops, max_epochs=8)
    return {"epoch": stops.stopped_epoch, "steps": made.global_step}


def rate_monitor(plan, devices, folder):
    logger = Memory()
    run(plan, devices, callbacks.LearningRateMonitor(log_momentum=True), logger=logger, log_every_n_steps=1)
    return {"rates": logger.logged("lr-SGD")} if logger.metrics else {}


class Same(Student):
    """Every rank has the whole batch: what the finder sees is the rank's own loss."""

    def loader(self):
        return torch.utils.data.DataLoader(Tokens(self.samples), batch_size=GLOBAL_BATCH)

    train_dataloader = val_dataloader = loader


def rate_finder(plan, devices, folder):
    finder = callbacks.LearningRateFinder(min_lr=1e-3, max_lr=1.0, num_training_steps=12, early_stop_threshold=None)
    with contextlib.redirect_stderr(io.StringIO()):
        module, made = run(plan, devices, finder, model=Same(), default_root_dir=folder)
    return {
        "left": names(folder),
        "tried": finder.optimal_lr.results["lr"],
        "found": finder.optimal_lr.results["loss"],
        "suggested": finder.optimal_lr.suggestion(skip_begin=1, skip_end=1),
        "lr": module.lr,
        "steps": made.global_step,
        "losses": module.losses[-STEPS * EPOCHS :],
    }


def accumulation_scheduler(plan, devices, folder):
    module, made = run(plan, devices, callbacks.GradientAccumulationScheduler({1: 2, 2: 4}))
    return {"steps": made.global_step, "losses": module.losses, "evaluated": module.evaluated}


def backbone_finetuning(plan, devices, folder):
    tunes = callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, lambda_func=lambda epoch: 1.5
    )
    module, made = run(plan, devices, tunes, model=Tuned())
    rates = [group["lr"] for group in made.optimizers[0].param_groups]
    return {"rates": rates, "losses": module.losses, "evaluated": module.evaluated}


def pruning(plan, devices, folder):
    module = Student()
    parts = [(module.blocks[0].up, "weight"), (module.blocks[1].down, "weight")]
    prunes = callbacks.ModelPruning("l1_unstructured", parts, amount=0.5, verbose=0)
    _, made = run(plan, devices, prunes, model=module)
    made.save_checkpoint(Path(folder) / "pruned.ckpt")
    saved = read_checkpoint(Path(folder) / "pruned.ckpt")["state_dict"]
    return {
        "zeros": [int((getattr(part, name) == 0).sum()) for part, name in parts],
        "pruned": prune.is_pruned(module),
        "keys": list(saved),
        "losses": module.losses,
    }


def hooks(plan, devices, folder):
    counts = {}

    def count(name):
        counts[name] = 0

        def hook(*_, **__):
            counts[name] += 1

        return hook

    all_hooks = ["setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_before_zero_grad"]
    all_hooks += ["on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"]
    all_hooks += ["on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end"]
    all_hooks += ["on_train_end", "on_fit_end", "teardown"]
    run(plan, devices, callbacks.LambdaCallback(**{name: count(name) for name in all_hooks}))
    return counts


def device_stats(plan, devices, folder):
    logger = Memory()
    run(plan, devices, callbacks.DeviceStatsMonitor(cpu_stats=True), logger=logger, log_every_n_steps=2)
    return {"measured": [sorted(row) for row in logger.logged("DeviceStatsMonitor")]} if logger.metrics else {}


class Watched:
    """Notes what a progress bar shows at the end of each epoch."""

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        # Logged without reduction: the rank's own.
        shown = {name: value for name, value in self.get_metrics(trainer, module).items() if name != "v_num"}
        self.shown = [*getattr(self, "shown", []), (self.total_train_batches, sorted(shown), shown["val_loss"])]


class Tqdm(Watched, callbacks.TQDMProgressBar):
    """Watched."""


class Rich(Watched, callbacks.RichProgressBar):
    """Watched."""


class Shows(Student):
    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True, prog_bar=True)


def progress(bar):
    def case(plan, devices, folder):
        shows = bar()
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run(plan, devices, shows, model=Shows(), enable_progress_bar=True)
        # The trainer keeps other ranks from showing anything.
        assert bool(out.getvalue()) == (int(os.environ.get("RANK", 0)) == 0)
        return {"totals": [row[0] for row in shows.shown], "losses": [float(f"{row[2]:.3g}") for row in shows.shown]}

    return case


class Summary(callbacks.ModelSummary):
    def _summary(self, trainer, module):
        self.seen = summary = super()._summary(trainer, module)
        return summary


class RichSummary(callbacks.RichModelSummary):
    def _summary(self, trainer, module):
        self.seen = summary = super()._summary(trainer, module)
        return summary


def summary(kind):
    def case(plan, devices, folder):
        module, shows = Student(), kind(max_depth=2)
        module.example_input_array = torch.zeros(2, 8, dtype=torch.long)
        with contextlib.redirect_stdout(io.StringIO()):
            run(plan, devices, shows, model=module, max_epochs=1, enable_model_summary=True)
        seen = shows.seen
        types = [name.removeprefix("FSDP") for name in seen.layer_types]
        return {
            "parameters": [seen.total_parameters, seen.trainable_parameters],
            "size": seen.model_size,
            "layers": list(zip(seen.layer_names, types, seen.param_nums, strict=True)),
            "shapes": list(zip(seen.in_sizes, seen.out_sizes, strict=True)),
            "losses": module.losses,
        }

    return case


def throughput(plan, devices, folder):
    logger = Memory()
    monitor = callbacks.ThroughputMonitor(batch_size_fn=len, window_size=2)
    run(plan, devices, monitor, logger=logger, log_every_n_steps=2, limit_val_batches=0)
    found = [row for row in logger.logged("train/") if row]
    return {
        "batches": [row["train/batches"] for row in found],
        "samples": [row["train/samples"] * devices for row in found],
    }


def timer(plan, devices, folder):
    stops = callbacks.Timer(duration=timedelta(microseconds=1), verbose=False)
    _, made = run(plan, devices, stops)
    assert stops.time_elapsed("train") > 0
    return {"steps": made.global_step, "stopped": made.should_stop}


class Writer(callbacks.BasePredictionWriter):
    """Keeps batches and the whole as files, as users do."""

    def __init__(self, folder):
        super().__init__("batch_and_epoch")
        self.folder, self.rank = Path(folder), int(os.environ.get("RANK", 0))

    def write_on_batch_end(self, trainer, module, prediction, indices, batch, batch_idx, dataloader_idx):
        torch.save((indices, prediction), self.folder / f"batch-{self.rank}-{batch_idx}.pt")

    def write_on_epoch_end(self, trainer, module, predictions, indices):
        torch.save((indices, predictions), self.folder / f"epoch-{self.rank}.pt")


def prediction_writer(plan, devices, folder):
    # A number of samples that ranks cannot share evenly, divided by Lightning's own sampler.
    samples = 3 * GLOBAL_BATCH // 2 + 1
    module = Student(samples=samples)
    module.predict_dataloader = lambda: torch.utils.data.DataLoader(Dataset(samples), batch_size=2)
    made = trainer(
        plan if plan is None or isinstance(plan, str) else LargeScaleStrategy(plan),
        devices=devices,
        callbacks=[Writer(folder)],
        use_distributed_sampler=True,
    )
    made.predict(module, return_predictions=False)
    made.strategy.barrier()
    by_batch, by_epoch = {}, {}
    for path in sorted(Path(folder).glob("batch-*.pt")):
        indices, prediction = torch.load(path)
        by_batch |= dict(zip(indices, prediction.tolist(), strict=True))
    for path in sorted(Path(folder).glob("epoch-*.pt")):
        indices, predictions = torch.load(path)
        by_epoch |= {
            index: row
            for some, prediction in zip(indices[0], predictions, strict=True)
            for index, row in zip(some, prediction.tolist(), strict=True)
        }
    assert sorted(by_epoch) == list(range(samples))
    return {"batches": dict(sorted(by_batch.items())), "epoch": dict(sorted(by_epoch.items()))}


class Dataset(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return torch.arange(index, index + 9) % 32


class Reads(Callback):
    """What users read of a module: its parameters, and its state."""

    def __init__(self):
        self.norms, self.sums, self.divided = [], [], set()

    def note(self, trainer, module, *_):
        # The square of a divided tensor is as divided, and so is its sum.
        whole = [getattr(p.detach(), "full_tensor", p.detach)() for p in module.parameters()]
        self.norms.append(float(sum(p.square().sum() for p in whole)))
        state = module.state_dict()
        self.sums.append({name: float(getattr(v, "full_tensor", v.clone)().sum()) for name, v in state.items()})

    def at_a_stop(self, trainer, module, *_):
        self.divided |= {isinstance(p, DTensor) for p in module.parameters()}
        self.note(trainer, module)

    on_train_start = on_train_batch_end = on_train_epoch_end = on_train_end = at_a_stop
    on_validation_start = on_validation_epoch_end = on_validation_end = at_a_stop
    # Between two batches of a validation some is gathered still.
    on_validation_batch_end = note


def reader(plan, devices, folder):
    reads = Reads()
    run(plan, devices, reads)
    assert reads.divided == {getattr(plan, "dp_shard", 1) > 1}
    return {"norms": reads.norms, "sums": reads.sums}


class OwnAverage(Callback):
    """An average as users write it: a copy, moved after each step, evaluated in the module's place, and saved."""

    def __init__(self, early):
        self.early, self.average = early, None

    def setup(self, trainer, module, stage):
        if self.early:
            self.average = copy.deepcopy(module)

    def on_fit_start(self, trainer, module):
        if not self.early:
            self.average = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        for mine, current in zip(self.average.parameters(), module.parameters(), strict=True):
            mine.lerp_(current, 0.5)

    def on_validation_start(self, trainer, module):
        self.kept = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.average.state_dict())

    def on_validation_end(self, trainer, module):
        module.load_state_dict(self.kept)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["average"] = self.average.state_dict()


def own_average(early):
    def case(plan, devices, folder):
        module, made = run(plan, devices, OwnAverage(early))
        made.save_checkpoint(Path(folder) / "with.ckpt")
        average = read_checkpoint(Path(folder) / "with.ckpt")["average"]
        assert all(type(value) is torch.Tensor for value in average.values())
        sums = {name: value.double().sum().item() for name, value in average.items()}
        return {"evaluated": module.evaluated, "losses": module.losses, "average": sums}

    return case


CASES = {
    "checkpoint_top": checkpoint_top,
    "checkpoint_steps": checkpoint_steps,
    "checkpoint_epochs": checkpoint_epochs,
    "checkpoint_time": checkpoint_time,
    "checkpoint_linked_last": checkpoint_linked_last,
    "checkpoint_exception": checkpoint_exception,
    "exception_checkpoint": exception_checkpoint,
    "early_stopping": early_stopping,
    "early_stopping_threshold": early_stopping_threshold,
    "rate_monitor": rate_monitor,
    "rate_finder": rate_finder,
    "accumulation_scheduler": accumulation_scheduler,
    "backbone_finetuning": backbone_finetuning,
    "pruning": pruning,
    "hooks": hooks,
    "device_stats": device_stats,
    "tqdm_bar": progress(Tqdm),
    "rich_bar": progress(Rich),
    "plain_summary": summary(Summary),
    "rich_summary": summary(RichSummary),
    "throughput": throughput,
    "timer": timer,
    "prediction_writer": prediction_writer,
    "reader": reader,
    "average_before_setup": own_average(True),
    "average_after_setup": own_average(False),
}


def play(case, plan, devices, folder):
    """The case's outcome on this rank."""
    return CASES[case](plan, devices, folder)
