"""Arguments of the Trainer, and of Fabric, that contradict the strategy: one sentence before any work."""

from __future__ import annotations

import lightning_fabric
import pytest
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from models import Language, trainer
from ranks import quiet
from torch import nn

from lightning_largescale import LargeScaleAutoStrategy, LargeScaleStrategy, Plan, PlanError

pytestmark = quiet


@pytest.mark.parametrize("package", [Fabric, lightning_fabric.Fabric], ids=["lightning", "lightning_fabric"])
@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ("largescale_auto", "'largescale_auto'"),
        ("largescale_tp", "'largescale_tp'"),
        (LargeScaleStrategy(Plan()), r"LargeScaleStrategy\(\.\.\.\)"),
        (LargeScaleAutoStrategy(), r"LargeScaleAutoStrategy\(\.\.\.\)"),
    ],
    ids=["string", "string of a later release", "object", "auto"],
)
def test_fabric(package, strategy, found):
    message = (
        f"^strategy={found} is for the Trainer and Fabric is not supported yet;"
        r" train a LightningModule by `from lightning\.pytorch import Trainer`\.$"
    )
    with pytest.raises(PlanError, match=message):
        package(strategy=strategy, accelerator="cpu", devices=1)


def test_fabric_is_untouched():
    assert type(Fabric(strategy="ddp", accelerator="cpu", devices=1).strategy).__name__ == "DDPStrategy"


@pytest.mark.parametrize("given", ["largescale_auto", LargeScaleStrategy(Plan())], ids=["string", "object"])
@pytest.mark.parametrize("second", [DDPStrategy, LargeScaleAutoStrategy])
def test_a_second_strategy_among_the_plugins(given, second):
    with pytest.raises(MisconfigurationException, match=r"Found invalid type for plugin .*Strategy.* Expected one of"):
        trainer(given, plugins=[second()])


def test_a_strategy_class_in_place_of_an_object():
    with pytest.raises(ValueError, match=r"invalid strategy name: `strategy=<class .*LargeScaleStrategy'>`"):
        trainer(LargeScaleStrategy)


class Normalised(Language):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(block, nn.BatchNorm1d(8)) for block in self.blocks)


@pytest.mark.parametrize("kind", [LargeScaleAutoStrategy, lambda: LargeScaleStrategy(Plan())], ids=["auto", "fixed"])
def test_synchronised_normalisation_has_nothing_to_do_on_one_process(kind):
    losses = []
    for strategy in ("auto", kind()):
        trainer(strategy, sync_batchnorm=True, max_steps=3).fit(model := Normalised())
        losses.append(model.losses)
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
    assert losses[0] == losses[1]


def synchronised(plan):
    strategy = LargeScaleStrategy(plan)
    try:
        trainer(strategy, devices=2, sync_batchnorm=True, max_steps=2).fit(Normalised())
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("plan", [Plan(dp_shard=2), Plan(dp_replicate=2)], ids=["ZeRO-3", "replicate"])
def test_synchronised_normalisation_that_the_device_cannot(two, plan):
    for kind, told in two.run(synchronised, plan):
        assert kind is ValueError
        assert told.startswith("SyncBatchNorm")
        assert "GPU" in told
