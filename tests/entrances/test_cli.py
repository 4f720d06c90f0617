"""LightningCLI: the strategy and its plan from YAML and the command line, and the configuration that a run saves."""

from __future__ import annotations

import contextlib
import io

import pytest
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from ranks import quiet

from lightning_largescale import LargeScaleAutoStrategy, LargeScaleStrategy, Plan

jsonargparse = pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI  # noqa: E402  # needs jsonargparse

# Parameters of Lightning and torch whose annotations jsonargparse cannot resolve are no concern of ours.
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore")]

FIXED = "lightning_largescale.LargeScaleStrategy"
AUTO = "lightning_largescale.LargeScaleAutoStrategy"


class Model(BoringModel):
    def __init__(self, width: int = 3):
        super().__init__()


def given(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def settings(folder, strategy):
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 1,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        "logger": given("lightning.pytorch.loggers.CSVLogger", save_dir=str(folder), version=1),
        "strategy": strategy,
    }


def configuration(folder, strategy):
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump({"trainer": settings(folder, strategy)}))
    return path


def cli(*arguments, run=True):
    arguments = [*(["fit"] if run else []), *map(str, arguments)]
    return LightningCLI(Model, args=arguments, run=run, save_config_kwargs={"overwrite": True})


def strategy_of(path):
    return cli("--config", path, run=False).trainer.strategy


@pytest.mark.parametrize(
    ("strategy", "kind"), [("largescale_auto", LargeScaleAutoStrategy), ("largescale_fsdp", LargeScaleStrategy)]
)
def test_a_string(tmp_path, strategy, kind):
    assert type(strategy_of(configuration(tmp_path, strategy))) is kind


FIELDS = {"activation_checkpointing": "full"}


@pytest.mark.parametrize("plan", [FIELDS, given("lightning_largescale.Plan", **FIELDS), "file"])
def test_a_plan(tmp_path, plan):
    if plan == "file":
        plan = str(tmp_path / "plan.json")
        Plan(**FIELDS).save(plan)
    strategy = strategy_of(configuration(tmp_path, given(FIXED, plan=plan, timeout="0:10:00")))
    assert type(strategy) is LargeScaleStrategy
    assert strategy.plan == Plan(**FIELDS)
    assert strategy._processes._timeout.total_seconds() == 600


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"dp_shards": 2}, "dp_shards=2 is no field of a Plan; accepted: dp_replicate"),
        ("missing.json", "plan file 'missing.json' cannot be read"),
    ],
)
def test_a_plan_that_is_none(tmp_path, plan, message):
    with pytest.raises(ValueError, match=message):
        strategy_of(configuration(tmp_path, given(FIXED, plan=plan)))


def test_what_auto_takes(tmp_path):
    options = {"memory_budget": "6GiB", "allow": ["bf16-mixed"], "plan_out": str(tmp_path / "out.json")}
    strategy = strategy_of(configuration(tmp_path, given(AUTO, **options)))
    assert strategy._memory_budget == 6 * 2**30
    assert strategy._allow == ("bf16-mixed",)
    # From the command line, over a file that names the strategy by its string.
    path = configuration(tmp_path, "largescale_auto")
    named = cli("--config", path, "--trainer.strategy", AUTO, "--trainer.strategy.memory_budget=7000", run=False)
    assert named.trainer.strategy._memory_budget == 7000


@pytest.mark.parametrize("strategy", [given(FIXED, plan={}), given(AUTO, memory_budget="6GiB"), "largescale_auto"])
def test_the_saved_configuration_is_read_back_to_the_same(tmp_path, strategy):
    path = configuration(tmp_path, strategy)
    run = cli("--config", path)
    assert run.trainer.global_step == 1
    folder = tmp_path / "lightning_logs" / "version_1"
    assert Plan.load(folder / "largescale_plan.json") == run.trainer.strategy.plan
    saved = (folder / "config.yaml").read_text()
    again = cli("--config", folder / "config.yaml")
    assert (folder / "config.yaml").read_text() == saved
    assert type(again.trainer.strategy) is type(run.trainer.strategy)
    assert again.trainer.strategy.plan == run.trainer.strategy.plan


def test_the_printed_configuration_is_read_back_to_the_same(tmp_path):
    path = configuration(tmp_path, given(FIXED, plan={"reshard_after_forward": False}))
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
        cli("--config", path, "--print_config")
    assert end.value.code == 0
    (tmp_path / "printed.yaml").write_text(printed.getvalue())
    assert cli("--config", tmp_path / "printed.yaml").trainer.strategy.plan == Plan(reshard_after_forward=False)
