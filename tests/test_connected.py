"""Processes of a run: which device and rank each is, and what they say to one another."""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import MPSAccelerator, XLAAccelerator
from models import Language, trainer
from ranks import quiet

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.plan import Plan, PlanError
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


@pytest.mark.parametrize(("accelerator", "name"), [(MPSAccelerator, "mps"), (XLAAccelerator, "xla")])
def test_other_accelerators_are_refused(accelerator, name):
    strategy = LargeScaleStrategy(Plan())
    message = f"accelerator='{name}' is not one that LargeScaleStrategy trains on; use accelerator='cpu' or 'cuda'"
    with pytest.raises(PlanError, match=message):
        # Lightning makes one only where there is such a device.
        strategy.accelerator = object.__new__(accelerator)


def test_one_process_is_connected_to_nothing():
    run = trainer(LargeScaleStrategy({}), max_steps=1)
    run.fit(Language())
    strategy = run.strategy
    assert not torch.distributed.is_initialized()
    assert (strategy.world_size, strategy.is_distributed, strategy.launcher) == (1, False, None)
    assert strategy.broadcast("word") == "word"
    assert strategy.reduce(torch.tensor(3.0)) == 3
    strategy.barrier()


def talk():
    strategy = trainer(LargeScaleStrategy(Plan(dp_replicate=2)), devices=2).strategy
    strategy.setup_environment()
    strategy.barrier()
    return (
        strategy.broadcast(f"from {strategy.global_rank}", src=1),
        float(strategy.reduce(torch.tensor(float(strategy.global_rank)))),
        float(strategy.reduce(torch.tensor(float(strategy.global_rank)), reduce_op="sum")),
        strategy.reduce("word"),
        strategy.reduce_boolean_decision(strategy.global_rank == 0, all=False),
        strategy.distributed_sampler_kwargs["rank"],
        strategy.process_group_backend,
    )


def test_ranks_talk(two):
    assert two.run(talk) == [("from 1", 0.5, 1.0, "word", True, rank, "gloo") for rank in range(2)]


def alone(kind):
    """Two ranks train together, then each by itself."""
    together = trainer(LargeScaleStrategy(Plan(dp_replicate=2)), devices=2, max_steps=1)
    together.fit(Language())
    seed = int(os.environ["RANK"])
    single = trainer(kind(), max_steps=3 + seed)
    single.fit(model := Language(seed=seed))
    strategy = single.strategy
    return (strategy.global_rank, strategy.world_size, strategy.is_global_zero), len(model.losses), model.losses[0]


@pytest.mark.parametrize("kind", [partial(LargeScaleStrategy, Plan()), LargeScaleAutoStrategy])
def test_a_trainer_of_one_device_is_alone_in_a_process_of_many(two, kind):
    (first, steps, loss), (second, more, other) = two.run(alone, kind)
    assert first == second == (0, 1, True)
    assert (steps, more) == (3, 4)
    assert loss != other


class Broken(Language):
    def configure_optimizers(self):
        raise RuntimeError("on purpose")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
def test_setups_that_fail_leave_no_process_group_behind(tmp_path):
    """Neither connected nor with its threads, however long torch remembers its mesh."""
    before = {*os.listdir("/proc/self/task")}
    for _ in range(2):
        strategy = LargeScaleStrategy(Plan(offload_parameters="nvme", nvme_path=str(tmp_path)))
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer(strategy).fit(Broken(layers=2))
        assert not dist.is_initialized()
    del strategy
    gc.collect()
    left = {*os.listdir("/proc/self/task")} - before
    assert not [name for name in map(thread_name, left) if "gloo" in name]


def thread_name(number):
    return Path(f"/proc/self/task/{number}/comm").read_text()
