import os
from datetime import timedelta
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from ranks import ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_largescale import compat


class Launched(compat.MultiProcessingLauncher):
    """Runs one rank in this process, without Lightning's `launch`."""

    def run(self, trainer, function):
        output = SimpleQueue()
        self.run_rank(0, trainer, function, (2,), {}, output)
        return output.get()

    def collect_results(self, trainer, results):
        return trainer and super().collect_results(trainer, results + 1)


def test_multi_processing_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(BoringModel())
    launcher = Launched(trainer.strategy, "fork")
    assert launcher.strategy is trainer.strategy
    assert (launcher.start_method, launcher.already_fit) == ("fork", False)
    launcher.already_fit = True
    assert launcher.already_fit
    assert launcher.run(None, lambda number: number) == 2
    trainer.state.fn = TrainerFn.FITTING
    output = launcher.run(trainer, lambda number: number)
    assert output.trainer_results == 3
    weight, module = trainer.lightning_module.layer.weight.clone(), trainer.lightning_module
    nn.init.zeros_(module.layer.weight)
    launcher.recover_results(output, trainer)
    assert torch.equal(module.layer.weight, weight)


def test_subprocess_script_launcher(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda command, env, **_: started.append(env["LOCAL_RANK"]))
    launcher = compat.SubprocessScriptLauncher(LightningEnvironment(), num_processes=3, num_nodes=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.setenv(name, os.environ.get(name, "0"))
        launcher.start_children()
    assert started == ["1", "2"]
    assert len(launcher.procs) == 2


class LaunchedByOurs(DDPStrategy):
    """A strategy with a launcher of its own."""

    def _configure_launcher(self):
        self._launcher = SimpleNamespace(launch=lambda function, *args, trainer, **kwargs: "launched")


def test_the_trainer_uses_the_launcher_that_a_strategy_configures():
    strategy = LaunchedByOurs()
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert trainer.fit(BoringModel()) is None
    assert strategy.launcher.launch(None, trainer=trainer) == "launched"
    assert not dist.is_initialized()


def test_share_threads(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compat.share_threads(64)
    assert torch.get_num_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    compat.share_threads(1024)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_check_main_guard():
    compat.check_main_guard()  # this process was not spawned


def test_global_states():
    torch.manual_seed(3)
    states = compat.global_states()
    drawn = torch.rand(2)
    states.restore()
    assert torch.equal(torch.rand(2), drawn)


def connect():
    environment = TorchElasticEnvironment()
    compat.init_process_group(environment, "gloo", torch.device("cpu"), timedelta(seconds=60))
    compat.set_rank_zero(environment.global_rank())
    mean = compat.reduce_tensor(torch.tensor(float(environment.global_rank())), None, "mean")
    shown = rank_zero_only(lambda: "shown")()
    mesh = init_device_mesh("cpu", (2,))
    layer = fully_shard(nn.Linear(2, 2), mesh=mesh, reshard_after_forward=True)
    compat.forget_forward(layer)
    layer.register_forward_pre_hook(lambda module, inputs: module.unshard())
    layer(torch.ones(1, 2))
    return dist.get_backend(), float(mean), shown, type(layer.weight) is nn.Parameter


def test_ranks_and_a_forward_that_gathers_nothing():
    # After such a forward FSDP frees what was gathered; forgotten, it stays.
    with ranks(2) as two:
        assert two.run(connect) == [("gloo", 0.5, "shown", True), ("gloo", 0.5, None, True)]


def test_the_tuner_ends_a_run_by_an_exception():
    assert issubclass(compat.TunerExit, Exception)
