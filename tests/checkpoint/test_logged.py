"""Loggers that take checkpoints are given them, or a warning says at setup that they are not."""

from __future__ import annotations

import warnings

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.utilities import _scan_checkpoints
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from models import Language, trainer
from ranks import quiet

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Uploads(CSVLogger):
    """Takes checkpoints as Lightning's loggers with `log_model` do."""

    def __init__(self, folder, log_model=True):
        super().__init__(folder)
        self._log_model, self.uploaded = log_model, []

    def after_save_checkpoint(self, checkpoint_callback):
        self.uploaded += [path for _, path, _, _ in _scan_checkpoints(checkpoint_callback, {})]


def fit(folder, plan, *, kind=Uploads, log_model=True, saves=True, plugin=None, **options):
    """The warnings of a fit, and whether what it saved has been logged."""
    logger = kind(folder) if log_model else kind(folder, log_model=False)
    callbacks = [ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1)] if saves else []
    run = trainer(
        LargeScaleStrategy(plan, **options),
        devices=plan.world_size,
        max_steps=1,
        logger=logger,
        enable_checkpointing=saves,
        callbacks=callbacks,
        plugins=[plugin()] if plugin else None,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Language())
    told = [str(one.message) for one in caught if "logs checkpoints that are files" in str(one.message)]
    return told, bool(getattr(logger, "uploaded", ()))


CASES = {
    "sharded": ({"plan": Plan(dp_shard=2)}, True, False),
    "divided": ({"plan": Plan(tp=2)}, True, False),
    "whole files": ({"plan": Plan(dp_shard=2), "save_full": True}, False, True),
    "a plugin of the user's": ({"plan": Plan(dp_shard=2), "plugin": AsyncCheckpointIO}, False, None),
    "replicated": ({"plan": Plan(dp_replicate=2)}, False, True),
    "a logger that takes none": ({"plan": Plan(dp_shard=2), "kind": CSVLogger}, False, False),
    "log_model=False": ({"plan": Plan(dp_shard=2), "log_model": False}, False, None),
    "nothing saved": ({"plan": Plan(dp_shard=2), "saves": False}, False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_warning_names_what_is_left_out(two, tmp_path, case):
    options, warned, logged = CASES[case]
    (told, uploaded), (told_other, _) = two.run(fit, tmp_path, **options)
    assert told_other == []
    assert len(told) == warned
    assert logged in (None, uploaded)
    for message in told:
        assert message.startswith("Uploads logs checkpoints")
        assert options["plan"].describe() in message
        assert "save_full=True" in message
