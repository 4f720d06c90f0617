"""Projects as users write them, in user_projects/, under plans that shard and that replicate, and plain."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import StrategyRegistry
from models import QUIET, read_checkpoint
from ranks import quiet

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

FOLDER = Path(__file__).parent / "user_projects"
# What Lightning tells users who evaluate on several devices, train twice into one folder, or keep adapters alone, and
# torch users whose layers make gradients in another layout than their weights'.
ADVICE = (
    "Using `DistributedSampler` with the dataloaders",
    "Checkpoint directory .* exists and is not empty",
    "Found keys that are in the model state dict but not in the checkpoint",
    "Grad strides do not match bucket view strides",
)
STRATEGIES = ["largescale_fsdp", "largescale_auto", "replicated"]
pytestmark = [*quiet, *(pytest.mark.filterwarnings(f"ignore:{advice}") for advice in ADVICE)]

# What each project's number must be, better than chance by far, and how near the plain run's where the steps are the
# same: None where each process draws its own noise, or shuffles by Lightning's sampler.
PROJECTS = {
    "autoencoder": (lambda error: error < 0.1, 0.02),
    "causal_lm": (lambda loss: loss < 1.0, 0.02),
    "classifier": (lambda accuracy: accuracy > 0.5, None),
    "contrastive": (lambda loss: loss < 2.0, 0.01),
    "forecaster": (lambda loss: loss < 0.2, 0.02),
    "gan": (lambda distance: distance < 1.0, None),
    "image_models": (lambda loss: loss < 1.0, 0.02),
    "image_models convnext": (lambda loss: loss < 1.0, 0.02),
    "lora": (lambda loss: loss < 1.0, 0.02),
    "lstm": (lambda loss: loss < 1.5, 0.01),
    "mean_teacher": (lambda accuracy: accuracy > 0.8, None),
    "multitask": (lambda loss: loss < 1.2, 0.02),
    "reinforce": (lambda points: points > 0.4, None),
    "text_classifier": (lambda loss: loss < 0.5, 0.02),
    "unet": (lambda overlap: overlap > 0.6, None),
    "vae": (lambda elbo: elbo > -30, None),
}

# Simpler than, or built as, another one.
ALIKE = {
    "autoencoder",
    "contrastive",
    "image_models",
    "mean_teacher",
    "multitask",
    "reinforce",
    "text_classifier",
    "vae",
}
# Those that take longest, beside the ones for every day.
LONG = {"classifier", "forecaster", "gan", "image_models convnext", "lora", "lstm", "unet"}


@pytest.fixture(autouse=True)
def _as_many_threads_as_a_rank():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(project: str) -> ModuleType:
    return importlib.import_module(f"user_projects.{project.split()[0]}")


def run(project, strategy, devices, folder):
    """The number that a project ends with."""
    StrategyRegistry.register("replicated", LargeScaleStrategy, plan=Plan(dp_replicate=2), override=True)
    options = dict(zip(["config"], project.split()[1:], strict=False))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # Where `seed_everything` leaves the seed for whatever trains next in this process.
        patch.setattr(os, "environ", os.environ.copy())
        for advice in ADVICE:
            warnings.filterwarnings("ignore", message=advice)
        return script(project).main(strategy, "cpu", devices, str(folder), **options)


@cache
def plain(project):
    with TemporaryDirectory() as folder:
        return run(project, "auto", 1, folder)


def check_checkpoint(project, folder):
    """The last checkpoint is whole weights; what it says that it scored is found again."""
    module = [
        value
        for value in vars(script(project)).values()
        if inspect.isclass(value) and issubclass(value, LightningModule) and value is not LightningModule
    ][-1]
    path = max(folder.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    loaded = module.load_from_checkpoint(path)
    assert all(type(parameter) is torch.nn.Parameter for parameter in loaded.parameters())
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    saved = read_checkpoint(path)
    scores = [state for state in saved.get("callbacks", {}).values() if state.get("monitor")]
    if scores and module.val_dataloader is not LightningModule.val_dataloader:
        [found] = Trainer(accelerator="cpu", devices=1, **QUIET).validate(loaded, verbose=False)
        assert found[scores[0]["monitor"]] == pytest.approx(float(scores[0]["current_score"]), rel=1e-3)


def cases():
    """Sharded every day, but for what another project goes through as well; all else is in the slow ones."""
    for project in PROJECTS:
        for strategy in STRATEGIES:
            daily = strategy == "largescale_fsdp" and project not in ALIKE | LONG
            yield pytest.param(project, strategy, marks=[] if daily else [pytest.mark.slow])


@pytest.mark.parametrize(("project", "strategy"), list(cases()))
def test_project(two, tmp_path, project, strategy):
    learned, tolerance = PROJECTS[project]
    number, others = two.run(run, project, strategy, 2, tmp_path)
    assert number == others
    assert learned(number), number
    if tolerance is not None:
        assert number == pytest.approx(plain(project), rel=tolerance)
    check_checkpoint(project, tmp_path)


@pytest.mark.parametrize(
    ("project", "strategy"),
    [
        pytest.param("classifier", "largescale_auto", marks=pytest.mark.slow),
        pytest.param("forecaster", "largescale_fsdp", marks=pytest.mark.slow),
        pytest.param("gan", "largescale_auto", marks=pytest.mark.slow),
        pytest.param("classifier", "auto", marks=pytest.mark.slow),
    ],
)
def test_as_a_script(tmp_path, project, strategy):
    """Run as its first lines say, in an empty folder."""
    options = ["--strategy", strategy, "--devices", "1" if strategy == "auto" else "2"]
    told = subprocess.run(
        [sys.executable, FOLDER / f"{project}.py", *options], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert told.returncode == 0, told.stderr
    learned, _ = PROJECTS[project]
    assert learned(float(told.stdout.splitlines()[-1].split()[-1]))
