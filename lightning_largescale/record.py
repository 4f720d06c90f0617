"""Record of the plan of a run: hyper-parameters of every logger, and JSON beside the run's files."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_largescale import compat
from lightning_largescale.plan import Plan

# Hyper-parameter that holds the plan's fields; loggers flatten it to "largescale/dp_shard" and the like.
KEY = "largescale"


def record_plan(trainer: Trainer, plan: Plan, *, report: str | None = None) -> None:
    """Log the plan as hyper-parameters with every logger, and write plan and report as JSON files.

    Called at setup, before Lightning logs the user's own hyper-parameters. These are logged here too, since TensorBoard
    shows the first hyper-parameters that it receives, and other loggers keep the last. `largescale_plan.json` and
    `largescale_report.json` are written to the directory of the first logger with a `log_dir`.

    Args:
        trainer: the Trainer, about to fit; without loggers, or in a fast development run, nothing is recorded.
        plan: the plan in force.
        report: JSON of all candidates, if the plan was searched for.
    """
    if not trainer.is_global_zero or not trainer.loggers:
        return
    if trainer.enable_autolog_hparams:
        own = _own_hparams(trainer)
        # Lightning's CSV logger writes YAML that has no tuples when it is read.
        fields = {name: [*value] if isinstance(value, tuple) else value for name, value in asdict(plan).items()}
        hparams = {KEY: fields, **own}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and not own:
                # It would log its "hp_metric" too, which a user without hyper-parameters does not expect.
                logger.log_hyperparams(hparams, metrics={})
            else:
                logger.log_hyperparams(hparams)
    folder = _run_folder(trainer)
    if folder is not None:
        _write(folder, "largescale_plan.json", plan.to_json())
        if report is not None:
            _write(folder, "largescale_report.json", report)


def _own_hparams(trainer: Trainer) -> dict[str, Any]:
    """Return the hyper-parameters that Lightning is about to log; it raises on contradictions itself."""
    hparams: dict[str, Any] = {}
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight
    for owner in (trainer.lightning_module, datamodule):
        if owner is not None:
            hparams.update(compat.logged_hparams(owner))
    return hparams


def _run_folder(trainer: Trainer) -> str | None:
    folders = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    return next((os.fspath(folder) for folder in folders if isinstance(folder, str | Path)), None)


def _write(folder: str, name: str, text: str) -> None:
    files = get_filesystem(folder)
    files.makedirs(folder, exist_ok=True)
    with files.open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)
