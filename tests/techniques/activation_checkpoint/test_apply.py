"""A run recomputes what its own plan says."""

from __future__ import annotations

import copy

from models import Language, trainer
from ranks import quiet

from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.techniques.activation_checkpoint.recompute import recomputes

pytestmark = quiet


class Copied(Language):
    """Is copied in the midst of training."""

    def on_train_start(self):
        self.recomputed = recomputes(self)

    def on_train_end(self):
        # No submodule of this one.
        self.copies = [copy.deepcopy(self)]


def test_a_copy_made_within_a_run_does_not_recompute_in_another():
    module = Copied()
    trainer(LargeScaleStrategy(Plan(activation_checkpointing="full")), max_steps=1).fit(module)
    assert module.recomputed
    assert not recomputes(module)
    (copied,) = module.copies
    assert recomputes(copied)
    trainer(LargeScaleStrategy(Plan()), max_steps=1).fit(copied)
    assert not copied.recomputed
    assert not recomputes(copied)
