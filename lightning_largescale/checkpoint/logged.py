"""Warning about loggers that log checkpoint files, but not checkpoint directories."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_largescale import compat
from lightning_largescale.checkpoint.files import is_remote
from lightning_largescale.plan import Plan


def warn_of_left_out(trainer: Trainer, plan: Plan) -> None:
    """Warn if a logger of `trainer` is to log checkpoints, which are directories under `plan`.

    Lightning's loggers look for files (`_scan_checkpoints`) and silently skip directories.
    """
    folders = [one.dirpath for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    if not any(folder is None or not is_remote(folder) for folder in folders):
        return
    for name in dict.fromkeys(type(logger).__name__ for logger in trainer.loggers if compat.logs_checkpoints(logger)):
        rank_zero_warn(
            f"{name} logs checkpoints that are files, and under this plan ({plan.describe()}) they are directories,"
            " which it leaves out; give the strategy save_full=True to have them logged, or copy the directories where"
            " they are to stay."
        )
