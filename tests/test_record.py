"""What a run keeps of its plan, and that what the user logs is as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger
from models import trainer
from ranks import quiet

from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = quiet


class Keeps(Logger):
    """A logger of the user's that keeps what it was given last, in no folder."""

    name, version = "keeps", 0

    def __init__(self):
        super().__init__()
        self.given = []

    def log_hyperparams(self, params):
        self.given.append(params)

    def log_metrics(self, metrics, step=None):
        pass


class Model(BoringModel):
    def __init__(self, width: int = 3, rate=0.1):
        super().__init__()
        self.save_hyperparameters()


class Data(LightningDataModule):
    def __init__(self, rows=8):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return BoringModel().train_dataloader()


def fit(*loggers, strategy=None, model=None, data=None, **options):
    strategy = strategy or LargeScaleStrategy(Plan())
    run = trainer(strategy, max_steps=1, logger=list(loggers), log_every_n_steps=1, **options)
    run.fit(model or Model(), datamodule=data)
    return run


OWN = {"width": 3, "rate": 0.1}
PLAIN = {
    "dp_replicate": 1,
    "dp_shard": 1,
    "tp": 1,
    "sequence_parallel": False,
    "reshard_after_forward": True,
    "precision": "32-true",
    "activation_checkpointing": "none",
    "checkpointed_blocks": None,
    "checkpointed_operations": "all",
    "extra_fsdp_modules": [],
    "row_sharded_embeddings": [],
    "offload_parameters": None,
    "offload_optimizer": None,
    "cpu_optimizer_step": False,
    "offload_activations": None,
    "nvme_path": None,
    "resident_parameter_bytes": None,
    "cpu_parameter_bytes": None,
    "resident_optimizer_bytes": None,
    "cpu_optimizer_bytes": None,
    "offloaded_blocks": None,
    "prefetched_blocks": 1,
    "release_gradients": False,
}


def test_every_logger_has_the_plan_and_keeps_the_users_own(tmp_path):
    keeps, table = Keeps(), CSVLogger(tmp_path, version=0)
    model = Model()
    run = fit(keeps, table, model=model)
    assert keeps.given == [{"largescale": PLAIN, **OWN}, OWN]
    assert dict(model.hparams) == dict(model.hparams_initial) == OWN
    folder = tmp_path / "lightning_logs" / "version_0"
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == {"largescale": PLAIN, **OWN}
    assert Plan.load(folder / "largescale_plan.json") == run.strategy.plan
    assert not (folder / "largescale_report.json").exists()


def test_the_report_is_written_beside_the_plan(tmp_path):
    run = fit(CSVLogger(tmp_path, version=0), strategy=LargeScaleAutoStrategy())
    folder = tmp_path / "lightning_logs" / "version_0"
    assert Plan.load(folder / "largescale_plan.json") == run.strategy.plan
    assert (folder / "largescale_report.json").read_text() == run.strategy.report.to_json()


def test_hyper_parameters_of_the_data_too():
    fit(keeps := Keeps(), data=Data())
    assert keeps.given == [{"largescale": PLAIN, "rows": 8, **OWN}, {"rows": 8, **OWN}]


def test_a_name_of_the_users_own_is_kept(tmp_path):
    model = Model()
    model.save_hyperparameters({"largescale": "mine"})
    fit(keeps := Keeps(), model=model)
    assert [given["largescale"] for given in keeps.given] == ["mine", "mine"]


def test_hyper_parameters_that_are_not_to_be_logged(tmp_path):
    silent = BoringModel()
    silent.save_hyperparameters({"width": 3}, logger=False)
    fit(keeps := Keeps(), model=silent)
    assert keeps.given == [{"largescale": PLAIN}]
    fit(keeps := Keeps(), CSVLogger(tmp_path, version=0), enable_autolog_hparams=False)
    assert keeps.given == []
    assert (tmp_path / "lightning_logs" / "version_0" / "largescale_plan.json").exists()


@pytest.mark.filterwarnings("ignore:.*barebones", "ignore:Starting from v1.9.0")
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"logger": False}, {"barebones": True}])
def test_runs_without_loggers_leave_no_files(tmp_path, options):
    given = {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "default_root_dir": tmp_path, **options}
    Trainer(strategy=LargeScaleStrategy(Plan()), devices=1, enable_checkpointing=False, **given).fit(Model())
    assert list(tmp_path.iterdir()) == []


def test_evaluation_records_nothing(tmp_path):
    keeps = Keeps()
    run = trainer(LargeScaleStrategy(Plan()), logger=[keeps, CSVLogger(tmp_path, version=0)], limit_val_batches=1)
    run.validate(Model(), verbose=False)
    assert keeps.given == [OWN]
    assert not list(tmp_path.rglob("largescale_*"))


def test_tensorboard_shows_the_plan_beside_the_users_own(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run = fit(TensorBoardLogger(tmp_path, version=0))
    read = events.EventAccumulator(run.log_dir)
    read.Reload()
    shown = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    names = set(HParamsPluginData.FromString(shown).session_start_info.hparams)
    # A list without names has nothing to show.
    assert names == {*OWN, *(f"largescale/{field}" for field, value in PLAIN.items() if value != [])}
    assert yaml.safe_load(Path(run.log_dir, "hparams.yaml").read_text()) == {"largescale": PLAIN, **OWN}


def test_tensorboard_logs_no_metric_for_a_user_without_hyper_parameters(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning.pytorch.loggers import TensorBoardLogger

    run = fit(TensorBoardLogger(tmp_path, version=0), model=BoringModel())
    read = events.EventAccumulator(run.log_dir)
    read.Reload()
    assert "hp_metric" not in read.Tags()["scalars"]
    assert yaml.safe_load(Path(run.log_dir, "hparams.yaml").read_text()) == {"largescale": PLAIN}
