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
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from models import Language, trainer
from ranks import quiet, ranks

from lightning_largescale import processes
from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
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


# Trainers that are asked for one device, or other numbers, in an environment that knows how many processes there are.


class OfAPlatform(LightningEnvironment):
    """As Ray's: Lightning's own, but for the numbers, which are the platform's; they are gone after the first fit."""

    def world_size(self):
        return int(os.environ["WORLD_SIZE"])

    def global_rank(self):
        return int(os.environ["RANK"])

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass


class OfAUser(ClusterEnvironment):
    """Written by a user, for processes that a tool of theirs has started."""

    creates_processes_externally = True
    main_address = property(lambda self: os.environ["MASTER_ADDR"])
    main_port = property(lambda self: int(os.environ["MASTER_PORT"]))
    ranks = 2

    @staticmethod
    def detect():
        return False

    def world_size(self):
        return self.ranks

    def set_world_size(self, size):
        pass

    def global_rank(self):
        return int(os.environ["RANK"])

    def set_global_rank(self, rank):
        pass

    def local_rank(self):
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self):
        return 0


class OfMore(OfAUser):
    """Knows of more processes than are connected."""

    ranks = 3


class NotStarted(OfAUser):
    """Leaves it to Lightning to start the processes."""

    creates_processes_externally = False
    ranks = 4


def found(environment, plan, devices=1, fits=2):
    """What Trainers find one after the other, and the last one's losses."""
    # Other tests have trained on all ranks in these processes.
    processes._asked_before.clear()
    before = os.environ["WORLD_SIZE"]
    try:
        for _ in range(fits):
            run = trainer(LargeScaleStrategy(plan), devices=devices, max_steps=3, plugins=[environment()])
            run.fit(model := Language())
    finally:
        os.environ["WORLD_SIZE"] = before
    hardware = run.strategy._hardware()
    return run.global_rank, run.world_size, (hardware.nodes, hardware.ranks_per_node), model.losses


@pytest.mark.parametrize(
    ("environment", "nodes", "devices"),
    [
        (OfAPlatform, (1, 2), 1),
        pytest.param(OfAUser, (1, 2), 1, marks=pytest.mark.slow),
        (KubeflowEnvironment, (2, 1), 1),
        pytest.param(OfAUser, (1, 2), 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "plan",
    [pytest.param(Plan(dp_replicate=2), marks=pytest.mark.slow), Plan(dp_shard=2)],
    ids=["replicated", "sharded"],
)
def test_the_environment_knows_how_many_there_are(two, environment, nodes, devices, plan):
    model = Language()
    trainer(max_steps=3).fit(model)
    for rank, (*told, losses) in enumerate(two.run(found, environment, plan, devices)):
        assert told == [rank, 2, nodes]
        assert losses == pytest.approx(model.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "devices", "message"),
    [
        (TorchElasticEnvironment, 1, "does not match the world size"),
        (OfMore, 1, "OfMore has 3 processes and torch.distributed connects 2"),
        (NotStarted, 2, "are to be started as 2 processes, and NotStarted has 4"),
    ],
)
def test_numbers_that_cannot_be_are_refused(environment, devices, message):
    plan = Plan(dp_replicate=environment.ranks if hasattr(environment, "ranks") else 2)
    # Each leaves the process group that the others' tests go on with.
    with ranks(2) as made:
        made.run(talk)
        answers = made.answers(found, environment, plan, devices)
    for error, _, _ in answers:
        assert isinstance(error, ValueError)
        assert message in str(error)


def test_slurm_says_what_to_set(monkeypatch):
    numbers = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in numbers.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    run = trainer(LargeScaleStrategy(Plan(dp_shard=2)), plugins=[SLURMEnvironment(auto_requeue=False)])
    with pytest.raises(ValueError, match="HINT: Set `devices=2`"):
        run.fit(Language())


def test_an_environment_that_cannot_answer_leaves_one_process_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run = trainer(LargeScaleStrategy(Plan()), max_steps=1, plugins=[KubeflowEnvironment()])
    run.fit(Language())
    assert run.world_size == 1


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
