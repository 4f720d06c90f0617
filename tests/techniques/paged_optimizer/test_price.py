"""Optimizer state in pages: who may step on it."""

from lightning_largescale.optimizers.fused import FUSED
from lightning_largescale.techniques.paged_optimizer.price import FUSED_NAMES


def test_the_host_steps_on_what_has_a_fused_kernel():
    assert {one.__name__ for one in FUSED} == FUSED_NAMES
