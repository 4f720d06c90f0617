from __future__ import annotations

import pytest
import pytorch_lightning
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from lightning_largescale import LargeScaleAutoStrategy, LargeScaleStrategy, Plan, PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.registry import (
    fsdp_cpu_offload_plan,
    fsdp_nvme_offload_plan,
    fsdp_plan,
    fsdp_tp_plan,
    tp_plan,
)

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}


def test_auto():
    assert type(Trainer(strategy="largescale_auto", **QUIET).strategy) is LargeScaleAutoStrategy


def test_fsdp():
    assert type(Trainer(strategy="largescale_fsdp", **QUIET).strategy) is LargeScaleStrategy
    hardware = Hardware.named("8xH100-80GB", nodes=2)
    assert fsdp_plan(hardware) == Plan(dp_shard=16)


@pytest.mark.parametrize("name", ["largescale_tp", "largescale_fsdp_tp"])
def test_tensor_parallel(name):
    assert type(Trainer(strategy=name, **QUIET).strategy) is LargeScaleStrategy


def test_tensor_parallel_sizes_follow_the_nodes():
    one, several = Hardware.named("8xH100-80GB"), Hardware.named("8xH100-80GB", nodes=4)
    assert tp_plan(one) == Plan(tp=8)
    assert tp_plan(several) == Plan(tp=8, dp_replicate=4)
    assert fsdp_tp_plan(one) == Plan(tp=2, dp_shard=4)
    assert fsdp_tp_plan(several) == Plan(tp=8, dp_shard=4)


def test_offload_strings_shard_over_all_and_keep_the_rest_elsewhere():
    hardware = Hardware.named("8xH100-80GB")
    dram = Plan(dp_shard=8, offload_parameters="cpu", offload_optimizer="cpu")
    assert fsdp_cpu_offload_plan(hardware) == dram
    assert fsdp_nvme_offload_plan(hardware) == Plan(dp_shard=8, offload_parameters="nvme", offload_optimizer="nvme")


@pytest.mark.parametrize(
    ("name", "technique"),
    [
        ("largescale_fsdp_8bit", "sharding with 8-bit optimizer state"),
    ],
)
def test_technique_of_a_later_release(name, technique):
    message = (
        f"^strategy='{name}' asks for {technique}, which this release does not carry out;"
        r" accepted are 'largescale_auto', 'largescale_fsdp', .*, 'largescale_fsdp_nvme_offload'\.$"
    )
    with pytest.raises(PlanError, match=message):
        Trainer(strategy=name, **QUIET)


@pytest.mark.parametrize("name", ["largescale_aut", "largescale", "lagrescale_fsdp", "LargeScale_FSPD"])
def test_misspelt(name):
    with pytest.raises(KeyError, match=r"not found in registry\. Available names: .* largescale_auto, largescale"):
        Trainer(strategy=name, **QUIET)


def test_other_names_are_untouched():
    with pytest.raises(ValueError, match="You selected an invalid strategy name: `strategy='zero3'`"):
        Trainer(strategy="zero3", **QUIET)
    assert type(Trainer(strategy="ddp", **QUIET).strategy).__name__ == "DDPStrategy"
    assert set(StrategyRegistry.available_strategies()) == set(StrategyRegistry)


class UsersOwn(LargeScaleStrategy):
    pass


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ("largescale_auto", "'largescale_auto'"),
        (LargeScaleStrategy(Plan()), r"LargeScaleStrategy\(\.\.\.\)"),
        (LargeScaleAutoStrategy(), r"LargeScaleAutoStrategy\(\.\.\.\)"),
        (UsersOwn(Plan()), r"UsersOwn\(\.\.\.\)"),
    ],
    ids=["string", "object", "auto", "subclass"],
)
def test_trainer_of_the_other_package(strategy, found):
    message = (
        f"^strategy={found} is for the Trainer of the package lightning and this one is pytorch_lightning's;"
        r" use `from lightning\.pytorch import Trainer`\.$"
    )
    with pytest.raises(PlanError, match=message):
        pytorch_lightning.Trainer(strategy=strategy, **QUIET)


def test_other_package_is_untouched():
    assert type(pytorch_lightning.Trainer(strategy="ddp", **QUIET).strategy).__name__ == "DDPStrategy"
    with pytest.raises(ValueError, match="You selected an invalid strategy name"):
        pytorch_lightning.Trainer(strategy="zero3", **QUIET)
