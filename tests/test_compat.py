"""Each use of a private API still does what we use it for."""

import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
import weakref
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner import tuning
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.compile import from_compiled
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from ranks import in_own_group, mesh_of, run_connected
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, _common_utils, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from lightning_largescale import compat, groups
from lightning_largescale.apart import run_apart


def roots():
    inner = nn.Linear(2, 2)
    module = nn.Sequential(inner, nn.Linear(2, 2))
    mesh = init_device_mesh("cpu", (1,))
    for one in (inner, module):
        fully_shard(one, mesh=mesh)
    compat.become_root(module)
    states = [fully_shard.state(one) for one in (module, inner)]
    before = [state._is_root for state in states]
    module(torch.ones(1, 2)).sum().backward()
    return before, inner.weight.grad is not None


def test_become_root():
    assert run_connected(1, roots) == [([True, False], True)]


def gather_and_scatter():
    rank, world = dist.get_rank(), dist.get_world_size()
    gathered, part = torch.zeros(2 * world), torch.zeros(2)
    compat.all_gather_tensor(gathered, torch.full((2,), float(rank)))
    compat.reduce_scatter_tensor(part, gathered + rank)
    return gathered.tolist(), part.tolist()


def test_all_gather_and_reduce_scatter():
    answers = run_connected(2, gather_and_scatter)
    assert answers == [([0.0, 0.0, 1.0, 1.0], [1.0, 1.0]), ([0.0, 0.0, 1.0, 1.0], [3.0, 3.0])]


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


def test_abort_process_groups():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    compat.abort_process_groups()
    assert not dist.is_initialized()


def test_forget_groups_of():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("x",))
    group = weakref.ref(dist.group.WORLD)
    compat.forget_groups_of(mesh)
    assert mesh.get_group() is group()
    dist.destroy_process_group()
    assert group() is None


def test_forget_cached_meshes():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    one, other = (init_device_mesh("cpu", (1,), mesh_dim_names=("x",)) for _ in range(2))
    for mesh in (one, other):
        tensor = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
        # Of the first that was met: where that changes, nothing is to be forgotten.
        assert (tensor + tensor).device_mesh is one
    compat.forget_cached_meshes("cpu")
    assert (tensor + tensor).device_mesh is other
    dist.destroy_process_group()


def test_check_main_guard():
    compat.check_main_guard()  # this process was not spawned


def test_global_states():
    torch.manual_seed(3)
    states = compat.global_states()
    drawn = torch.rand(2)
    states.restore()
    assert torch.equal(torch.rand(2), drawn)


def test_fakes_have_no_data():
    mode = compat.fake_tensor_mode()
    with mode:
        fake = torch.randn(2**40)
    assert compat.is_fake(fake)
    assert not compat.is_fake(torch.ones(1))
    with mode, pytest.raises(compat.data_dependent_errors()):
        fake.sum().item()
    with mode, pytest.raises(compat.data_dependent_errors()):
        fake.nonzero()
    with mode, compat.without_dispatch_modes():
        assert torch.ones(1).item() == 1.0


def test_silent_fakes(caplog):
    def fail():
        with compat.fake_tensor_mode(), pytest.raises(RuntimeError):
            torch.mm(torch.ones(2, 2), torch.ones(3, 3))

    with compat.silent_fakes():
        fail()
    assert caplog.records == []
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    assert not logger.disabled


def test_dispatch_mode_sees_operations_and_autograd_numbers_its_nodes():
    seen = []

    class Watch(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), compat.current_node_sequence()))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Watch():
        before = compat.sequence_number()
        loss = (x * 3).sum()
        after = compat.sequence_number()
        loss.backward()
    assert ("aten.mul.Tensor", None) in seen
    assert after == before + 2
    (number,) = {number for name, number in seen if name == "aten.mul.Tensor" and number is not None}
    assert number == before
    assert compat.current_node_sequence() is None


def test_mutated_arguments():
    assert compat.mutated_arguments(torch.ops.aten.add_.Tensor) == (0,)
    assert compat.mutated_arguments(torch.ops.aten.add.out) == ("out",)
    assert compat.mutated_arguments(torch.ops.aten.add.Tensor) == ()


def test_children_and_tensors_of_modules():
    layer = nn.BatchNorm1d(2)
    assert compat.all_children(nn.ModuleList([layer, layer])) == [("0", layer), ("1", layer)]
    parameters, buffers = compat.own_tensors(layer)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    parameters["weight"] = other = nn.Parameter(torch.ones(2))
    assert layer.weight is other


# Compressed layouts say that they are new.
@pytest.mark.filterwarnings("ignore:Sparse")
def test_dense_parts():
    matrix = torch.eye(3)
    assert compat.dense_parts(matrix)[0] is matrix
    for layout, shapes in [(torch.sparse_coo, [(2, 3), (3,)]), (torch.sparse_csr, [(4,), (3,), (3,)])]:
        assert [tuple(part.shape) for part in compat.dense_parts(matrix.to_sparse(layout=layout))] == shapes
    assert len(compat.dense_parts(matrix.to_sparse_csc())) == 3
    assert compat.dense_parts(matrix.to_mkldnn()) == []


@pytest.mark.filterwarnings("ignore")
def test_dense_parts_are_written_into():
    codes = torch.quantize_per_tensor(torch.ones(2, 3), 0.5, 0, torch.qint8)
    ragged = [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=one) for one in _LAYOUTS]
    for tensor in (codes, *ragged):
        for part in compat.dense_parts(tensor):
            if part.dtype not in (torch.int64,):
                part.zero_()
        assert not any(float(one.abs().sum()) for one in (tensor.dequantize().unbind() if tensor is codes else tensor))


_LAYOUTS = (torch.strided, torch.jagged)


def test_is_wrapper():
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert compat.is_wrapper(ragged)
    assert not any(map(compat.is_wrapper, (torch.ones(2), nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse())))


def gathered_in_order():
    module = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False))
    before = module[0].weight.detach().clone()
    dist.broadcast(before, 0)
    with torch.no_grad():
        module[0].weight.copy_(before)
    fully_shard(module[0])
    fully_shard(module)
    made = []
    compat.when_gathered(module[0], module[0].weight, made.append, (1, 0))
    seen = []
    module[0].register_forward_pre_hook(lambda part, _: seen.append((part.weight.stride(), part.weight.data.clone())))
    for _ in range(2):
        module(torch.ones(1, 2))
        freed = made[0].untyped_storage().nbytes()
    return [(stride, torch.equal(values, before)) for stride, values in seen], len(made), freed


def test_when_gathered():
    assert run_connected(2, gathered_in_order) == [([((1, 4), True)] * 2, 1, 0)] * 2


class Told(torch.Tensor):
    """A tensor that tells what is asked of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (func, compat.call_as_tensor(func, args, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return torch.tensor(7.0)


def test_tensor_without_values():
    made = compat.tensor_without_values(Told, (2, 3), torch.bfloat16, torch.device("cpu"))
    told = type(made), compat.call_as_tensor(torch.Tensor.size, (made,), {})
    assert told == (Told, (2, 3))
    assert compat.call_as_tensor(torch.Tensor.neg, (made,), {}) == 7


def test_call_as_tensor():
    made = compat.tensor_without_values(Told, (2,), torch.float32, torch.device("cpu"))
    assert made.size() == (torch.Tensor.size, (2,))
    assert compat.call_as_tensor(torch.Tensor.size, (made,), {}) == (2,)


# torch.compile's own import warns of torch.jit.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_module():
    layer = nn.Linear(2, 2)
    assert compat.compiled_module(torch.compile(layer)) is layer
    assert compat.compiled_module(layer) is layer
    scripted = torch.jit.script(layer)
    assert compat.compiled_module(scripted) is scripted


def test_attached_trainer():
    module, trainer = LightningModule(), object()
    assert compat.attached_trainer(module) is None
    compat.attach_trainer(module, trainer)
    assert compat.attached_trainer(module) is module.trainer is trainer


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


def test_ranks_and_a_forward_that_gathers_nothing(two):
    # After such a forward FSDP frees what was gathered; forgotten, it stays.
    assert two.run(connect) == [("gloo", 0.5, "shown", True), ("gloo", 0.5, None, True)]


def test_sharding_attributes():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        layer = nn.Linear(2, 2)
        before = {*vars(layer)}
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert {*vars(layer)} - before == compat.sharding_attributes()
    finally:
        dist.destroy_process_group()


def test_pruning_originals():
    layer = nn.Linear(2, 2)
    pruning = ModelPruning("l1_unstructured", [(layer, "weight")])
    assert compat.pruning_originals(pruning) == []
    pruning.setup(None, nn.Sequential(layer), "fit")
    (original,) = compat.pruning_originals(pruning)
    assert original is not layer
    assert torch.equal(original.weight, layer.weight)


def test_skips_backward():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not compat.skips_backward(trainer)
    trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward = True
    assert compat.skips_backward(trainer)


@pytest.mark.filterwarnings("ignore:.* is deprecated", "ignore:.*does not have many workers")
def test_flag_sigterm_only():
    before = signal.getsignal(signal.SIGTERM)
    passed_on = []

    class Sends(BoringModel):
        def on_train_start(self):
            self.trainer.strategy._launcher = SimpleNamespace(kill=passed_on.append)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = Trainer(accelerator="cpu", max_steps=4, limit_val_batches=0, **quiet)
    compat.flag_sigterm_only(run)
    with pytest.raises(SystemExit):
        run.fit(Sends())
    assert run.global_step == 1
    assert passed_on == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.filterwarnings("ignore:.* is deprecated", "ignore:.*does not have many workers")
def test_requeue_signal_counted_and_called_before_batches(tmp_path, monkeypatch):
    for name in ("NTASKS", "NTASKS_PER_NODE", "JOB_ID", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    monkeypatch.setenv("SLURM_NODELIST", "127.0.0.1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = []

    class Sends(BoringModel):
        def training_step(self, batch, index):
            os.kill(os.getpid(), signal.SIGUSR1)
            told.append(index)
            return super().training_step(batch, index)

        def on_save_checkpoint(self, checkpoint):
            told.append("saved")

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"limit_val_batches": 0, "plugins": [SLURMEnvironment()], "default_root_dir": tmp_path, **quiet}
    run = Trainer(accelerator="cpu", max_steps=2, **options)
    with (
        compat.requeue_signal_counted(run, lambda: told.append("signal")) as save_and_requeue,
        compat.called_before_batches(run, lambda: told.append("before")),
    ):
        run.fit(Sends())
    assert told == ["before", "signal", 0, "before", "signal", 1]
    save_and_requeue()
    assert told[-1] == "saved"
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()
    assert not {"advance", "_slurm_sigusr_handler_fn"} & {*vars(run.fit_loop.epoch_loop), *vars(run._signal_connector)}


def test_logs_checkpoints(tmp_path):
    class Own(CSVLogger):
        def after_save_checkpoint(self, checkpoint_callback):
            """Uploads it."""

    assert compat.logs_checkpoints(Own(tmp_path))
    assert not any(compat.logs_checkpoints(kind(tmp_path)) for kind in (CSVLogger, TensorBoardLogger))
    assert not compat.logs_checkpoints(object.__new__(CometLogger))
    for kind in (WandbLogger, MLFlowLogger):
        # Their constructors want packages that need not be here.
        for log_model in ("all", True, False):
            logger = object.__new__(kind)
            logger._log_model = log_model
            assert compat.logs_checkpoints(logger) is bool(log_model)


def test_set_received_sigterm():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for received in (True, False):
        compat.set_received_sigterm(trainer, received)
        assert trainer.received_sigterm is received


@pytest.mark.filterwarnings("ignore:.* is deprecated", "ignore:.*does not have many workers")
def test_evaluation_is_empty_and_call_when_exhausted():
    class Told(BoringModel):
        def on_validation_start(self):
            self.told = [compat.evaluation_is_empty(self.trainer)]
            compat.call_when_exhausted(self.trainer, lambda: self.told.append("exhausted"))

        def validation_step(self, batch, index):
            self.told.append(index)

    for batches, loader in ((2, iter([torch.ones(1, 32)] * 2)), (3, DataLoader(torch.ones(4, 32))), (0, iter([]))):
        model = Told()
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(accelerator="cpu", limit_val_batches=3, **options).validate(model, dataloaders=loader, verbose=False)
        # With a limit nothing is looked for.
        assert model.told == [False, *range(batches), "exhausted"]
    model = Told()
    Trainer(accelerator="cpu", **options).validate(model, dataloaders=iter([]), verbose=False)
    assert model.told == [True, "exhausted"]


class Loaded(LightningModule):
    """Has a loader of its own and hooks on batches."""

    asked = 0

    def train_dataloader(self):
        self.asked += 1
        return [torch.zeros(2)]

    def training_step(self, batch, index):
        return None

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch + 1


def connected(module, **loaders):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer._data_connector.attach_data(module, **loaders)
    return trainer


def test_loaders_are_asked_once_and_then_given():
    module = Loaded()
    loop = connected(module).fit_loop
    source = compat.loader_source(loop)
    loaders = compat.request_loaders(source)
    compat.keep_loaders(loop, source, loaders)
    assert compat.request_loaders(loop._data_source) is loaders
    assert module.asked == 1
    assert loop._data_source is source
    compat.request_loaders(loop._data_source)
    assert module.asked == 2


def test_function_modes_are_left_for_a_while():
    class Seen(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(2)
        assert seen.count == 1
        with compat.without_function_modes():
            torch.ones(2)
        assert seen.count == 1


def test_a_condition_that_a_device_checks():
    compat.assert_async(torch.tensor(True), "never said")
    with pytest.raises(RuntimeError, match="is said"):
        compat.assert_async(torch.tensor(False), "is said")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_torch_compiles_is_told():
    module = nn.Linear(1, 1)
    assert not compat.is_compiled(module)
    assert compat.is_compiled(torch.compile(module))
    module.compile()
    assert compat.is_compiled(module)
    given = from_compiled(torch.compile(BoringModel()))
    assert compat.is_compiled(given)


def test_full_backward_hooks_are_found():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert not compat.has_full_backward_hooks(module)
    module.register_full_backward_hook(lambda *_: None)
    assert not compat.has_full_backward_hooks(module)
    for register in (module[0].register_full_backward_hook, module[0].register_full_backward_pre_hook):
        handle = register(lambda *_: None)
        assert compat.has_full_backward_hooks(module)
        handle.remove()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    assert compat.has_full_backward_hooks(module)
    handle.remove()


def test_kept_loaders_can_be_dropped():
    module = Loaded()
    loop = connected(module).fit_loop
    source = compat.loader_source(loop)
    compat.keep_loaders(loop, source, compat.request_loaders(source))
    compat.drop_kept_loaders(loop)
    assert loop._data_source is source
    compat.drop_kept_loaders(loop)
    compat.request_loaders(compat.loader_source(loop))
    assert module.asked == 2


def test_kept_loaders_give_way_to_those_of_a_later_run():
    module = Loaded()
    trainer = connected(module, train_dataloaders=[1])
    source = compat.loader_source(trainer.fit_loop)
    compat.keep_loaders(trainer.fit_loop, source, compat.request_loaders(source))
    trainer._data_connector.attach_data(module, train_dataloaders=[2])
    assert compat.request_loaders(compat.loader_source(trainer.fit_loop)) == [2]


def test_no_loader_to_ask_for():
    class Bare(LightningModule):
        """Has none."""

    assert compat.loader_source(connected(Bare()).predict_loop) is None


def test_batches_are_combined_as_the_loader_combines_them():
    assert compat.combine_batches(CombinedLoader({"a": [1], "b": [2]}, "max_size"), [1, 2]) == {"a": 1, "b": 2}
    assert compat.combine_batches(CombinedLoader([[1], [2]], "sequential"), [1, 2]) == 1


def test_before_transfer():
    module = Loaded()
    connected(module)
    assert torch.equal(compat.before_transfer(module, torch.zeros(2)), torch.ones(2))


@dataclasses.dataclass
class Held:
    value: object


def test_leaves_of_any_containers():
    assert compat.leaves({"a": [1, (2,)], "b": (unknown := Loaded())}) == [1, 2, unknown]
    assert compat.leaves([Held([3, Held(4)]), Held]) == [3, 4, Held]


def test_version_counts_writes():
    tensor = torch.zeros(2)
    before = compat.version(tensor)
    _ = tensor + 1
    assert compat.version(tensor) == before
    tensor.add_(1)
    assert compat.version(tensor) > before


def divided_and_undone():
    dist.is_initialized() or dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = []
    module[0].register_forward_hook(lambda *_: kept.append("user"))
    before = [{key: value for key, value in vars(part).items() if "hooks" not in key} for part in module.modules()]
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    module(torch.ones(2, 4)).sum().backward()
    with torch.no_grad(), compat.without_gathering(module[0]):
        shard = module[0].weight.to_local()
        assert module[0].weight.shape == (4, 4)
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            module[0](torch.ones(2, 4))
        assert shard.shape == (2, 4)
    with torch.no_grad():
        module(torch.ones(2, 4))
    compat.undo_sharding(module)
    compat.undo_sharding(module[0])
    hooks = [len(part._forward_pre_hooks) + len(part._state_dict_pre_hooks) for part in module.modules()]
    after = [{key: value for key, value in vars(part).items() if "hooks" not in key} for part in module.modules()]
    return type(module), kept, hooks, [[*part] for part in before] == [[*part] for part in after]


def test_undo_sharding_and_without_gathering():
    for kind, kept, hooks, same in run_connected(2, divided_and_undone):
        assert kind is nn.Sequential
        assert kept == ["user"] * 2
        assert hooks == [0, 0, 0]
        assert same


def test_hooks_nearest_to_a_step():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("user's before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("user's after"))
    remove = compat.hook_nearest(optimizer, lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["user's before", "before", "after", "user's after"]
    remove()
    optimizer.step()
    assert seen[4:] == ["user's before", "user's after"]


class Based(torch.optim.SGD):
    """Its step calls a step that calls the hooks again."""

    def step(self, closure=None):
        return super().step(closure)


def test_without_step_hooks():
    torch.optim.SGD([nn.Parameter(torch.zeros(()))])
    optimizer = Based([nn.Parameter(torch.zeros(()))], lr=1.0)
    seen = []
    before = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with compat.without_step_hooks(optimizer):
        optimizer.step()
    assert seen == []
    optimizer.step()
    assert seen == ["before", "before", "after", "after"]
    before.remove()
    optimizer.step()
    assert seen[4:] == ["after", "after"]


def fake_in_a_fork():
    def alone():
        compat.fake_process_group()
        dist.barrier()
        return dist.get_rank(), dist.get_backend()

    answer = run_apart(alone)
    dist.barrier()
    return answer


def test_fake_process_group():
    assert run_connected(2, fake_in_a_fork) == [(0, "fake"), (1, "fake")]


def test_logged_hparams():
    module = BoringModel()
    module.save_hyperparameters({"width": 3}, logger=False)
    assert compat.logged_hparams(module) == {}
    # As LightningCLI adds for itself.
    module.save_hyperparameters({"width": 3, "_class_path": "BoringModel"})
    assert compat.logged_hparams(module) == {"width": 3}


def test_layer_sync():
    for wanted in (False, True):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=wanted, logger=False,
            enable_checkpointing=False,
        )  # fmt: skip
        assert isinstance(compat.layer_sync(trainer.strategy), LayerSync) is wanted


def refusals(strategy):
    """What Lightning's Tuner and BatchSizeFinder say to a run on two processes with no loader and no batch size."""
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    assert run._accelerator_connector.is_distributed
    said = ["", ""]
    for index, check in enumerate((tuning._check_scale_batch_size_configuration, BatchSizeFinder().setup)):
        try:
            check(*(run, BoringModel(), "fit")[: 1 + 2 * index])
        except (ValueError, MisconfigurationException) as error:
            said[index] = str(error)
    return said


def test_only_the_batch_size_finder_is_told_of_a_single_process():
    assert all("not supported with distributed" in said for said in refusals("ddp"))
    assert not any("distributed" in said for said in refusals("largescale_fsdp"))
    assert not compat.asked_by_batch_size_finder()


def test_dataset_length():
    loop = connected(Loaded()).fit_loop
    loop._combined_loader = CombinedLoader([[1, 2, 3]])
    for _ in range(2):
        compat.set_dataset_length(loop, lambda own: 5)
    assert loop._combined_loader._dataset_length() == 5


def test_searched_attribute():
    module = Loaded()
    module.batch_size = module.learning_rate = 1
    assert compat.searched_attribute(BatchSizeFinder(), module) == "batch_size"
    assert compat.searched_attribute(LearningRateFinder(), module) == "learning_rate"
    assert compat.searched_attribute(LearningRateFinder(update_attr=False), module) is None


def test_the_tuner_ends_a_run_by_an_exception():
    assert issubclass(compat.TunerExit, Exception)


def fail(*_):
    raise ZeroDivisionError


def half_a_step():
    """Whether a step after one that ended in the midst of its backward has the gradients of the one before."""
    torch.manual_seed(0)
    environment = TorchElasticEnvironment()
    compat.init_process_group(environment, "gloo", torch.device("cpu"), timedelta(seconds=60))
    root = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for part in (*root, root):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))

    def gradients():
        root.zero_grad()
        root(torch.ones(2, 4)).sum().backward()
        return [parameter.grad.full_tensor() for parameter in root.parameters()]

    before = gradients()
    handle = root[1].register_full_backward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        gradients()
    handle.remove()
    compat.forget_sharded_step(root)
    return all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))


def test_forget_sharded_step(two):
    assert two.run(half_a_step) == [True, True]


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: torch.Tensor


class InFrozen(nn.Linear):
    def forward(self, x):
        return Frozen(super().forward(x))


def backward_of_frozen():
    """Also as with a torch that does not look into dataclasses."""
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    gradients = []
    for known in (True, False):
        block = fully_shard(InFrozen(4, 4), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
        output = block(torch.ones(1, 4))
        with pytest.MonkeyPatch.context() as patch:
            if not known:
                patch.delattr(_common_utils, "collect_grad_tensors", raising=False)
            compat.gather_for_backward_of(block, [output.value])
        output.value.sum().backward()
        gradients.append(block.weight.grad.full_tensor())
    return torch.equal(*gradients)


def test_gather_for_backward_of(two):
    assert two.run(backward_of_frozen) == [True, True]


def hooks_of_a_sharded_module():
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    block = nn.Linear(4, 4)
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    given = []
    with pytest.MonkeyPatch.context() as patch:
        register = torch.Tensor.register_hook
        patch.setattr(
            torch.Tensor, "register_hook", lambda tensor, hook: (given.append(hook), register(tensor, hook))[1]
        )
        output = block(torch.ones(2, 4))
        output.register_hook(lambda gradient: gradient)
    return [compat.is_of_sharding(hook) for hook in given]


def test_is_of_sharding(two):
    assert two.run(hooks_of_a_sharded_module) == [[True, False]] * 2


def test_argument():
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    x = torch.ones(1, 1, 2, 4)
    assert compat.argument(attend, "dropout_p", (x, x, x), {}, None) == 0.0
    assert compat.argument(attend, "dropout_p", (x, x, x, 0.5), {}, None) == 0.5
    assert compat.argument(attend, "dropout_p", (x, x, x), {"dropout_p": 0.25}, None) == 0.25
    assert compat.argument(torch.ops.aten.mm.default, "dropout_p", (x, x), {}, 1.0) == 1.0


def test_is_transformed():
    seen = []
    torch.func.grad(lambda x: (seen.append(compat.is_transformed(x)), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert not compat.is_transformed(torch.ones(2))


def test_is_operator():
    assert compat.is_operator(torch.ops.aten.mm.default)
    assert not compat.is_operator(torch.ops.higher_order.cond)


class Aliased(compat.DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.alias = compat.alias(made)
        return made


def test_alias():
    with Aliased() as mode:
        made = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
    assert mode.alias.data_ptr() == made.data_ptr()
    assert mode.alias.grad_fn is None
    before = compat.version(mode.alias)
    with torch.no_grad():
        made.add_(1)
    assert compat.version(mode.alias) == before + 1


def test_foreach_kind():
    kinds = {torch._foreach_norm: "norms", torch._foreach_mul_: "in place", torch._foreach_mul: None, torch.stack: None}
    assert {function: compat.foreach_kind(function) for function in kinds} == kinds
    assert compat.foreach_kind(torch._amp_foreach_non_finite_check_and_unscale_) == "unscale"
    assert compat.foreach_kind(object()) is None


def test_view_base_and_view_base_getter():
    whole = torch.ones(4)
    assert compat.view_base(whole) is None
    with Functions() as functions:
        assert compat.view_base(whole[1:]) is whole
    assert compat.view_base_getter() in functions.seen


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_function_getter_and_setter():
    tensor = torch.zeros(2)
    with Functions() as functions:
        device, tensor.data = tensor.device, torch.ones(2)
    assert device.type == "cpu"
    assert compat.function_getter("device") in functions.seen
    assert compat.function_setter("data") in functions.seen


def test_returns_tensors():
    aten = torch.ops.aten
    kinds = [aten.add.Tensor, aten.unbind.int, aten.qr.default, aten._local_scalar_dense.default, aten.equal.default]
    assert [compat.returns_tensors(kind) for kind in kinds] == [True, True, True, False, False]


def test_hook_tables():
    module = nn.Linear(1, 1)
    assert not any(compat.hook_tables(module))
    registers = (
        module.register_forward_pre_hook,
        module.register_forward_hook,
        module.register_full_backward_pre_hook,
        module.register_full_backward_hook,
        module.register_state_dict_post_hook,
        module.register_load_state_dict_post_hook,
    )
    for register in registers:
        handle = register(lambda *_: None)
        (table,) = [table for table in compat.hook_tables(module) if handle.id in table]
        del table[handle.id]
    assert not any(compat.hook_tables(module))


def test_gradient_hooks():
    weight = nn.Parameter(torch.ones(2))
    assert compat.gradient_hooks(weight) == ([], [])
    weight.register_hook(torch.neg)
    weight.register_post_accumulate_grad_hook(print)
    assert compat.gradient_hooks(weight) == ([torch.neg], [print])


def test_returns_views():
    aten = torch.ops.aten
    kinds = [aten.select.int, aten.split.Tensor, aten.detach.default, aten.add.Tensor, aten.add_.Tensor]
    assert [compat.returns_views(kind) for kind in kinds] == [True, True, True, False, False]


class Generators(compat.DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.key = compat.generator_key(kwargs["generator"])
        return func(*args, **kwargs)


def test_storage_users():
    for device in ("cpu", "meta"):
        tensor = torch.empty(3, device=device)
        storage = tensor.untyped_storage()
        assert compat.storage_users(storage) == 1
        views = [tensor[1:], tensor.detach()]
        assert compat.storage_users(storage) == 3
        views.pop()
        assert compat.storage_users(storage) == 2
        assert len(views) == 1


def test_generator_key():
    own = torch.Generator()
    for generator in (own, torch.default_generator):
        with Generators() as seen:
            torch.rand(2, generator=generator)
        assert seen.key == compat.generator_key(generator)
    assert compat.generator_key(own) != compat.generator_key(torch.default_generator)


def test_marked_state_and_mark_of():
    generator = torch.Generator().manual_seed(2**40 + 7)
    torch.rand(5, generator=generator)
    assert compat.mark_of(generator.get_state()) is None
    for number in (0, 2**33 + 5):
        marked = compat.marked_state(generator.get_state(), number)
        generator.set_state(marked)
        assert torch.equal(generator.get_state(), marked)
        assert compat.mark_of(generator.get_state()) == number
        assert generator.initial_seed() == 2**40 + 7
    torch.rand(1000, generator=generator)
    assert compat.mark_of(generator.get_state()) is None


def test_call_after_backward():
    order = []
    weight = torch.ones(2, requires_grad=True)
    inner = weight * 2
    inner.register_hook(lambda _: order.append("backward"))
    loss = inner.sum()
    compat.call_after_backward(loss, lambda: order.append(weight.grad is not None))
    loss.backward()
    assert order == ["backward", True]


def test_current_backward():
    found = []

    def within(gradient):
        found.append(compat.current_backward())
        with torch.enable_grad():
            inner = torch.ones(1, requires_grad=True)
            weight = inner * 2
            weight.register_hook(lambda _: found.append(compat.current_backward()))
            weight.backward()

    loss = torch.ones(1, requires_grad=True) * 2
    loss.register_hook(within)
    loss.backward()
    outer, inner = found
    assert outer != inner


def reduced_gradients():
    module = nn.Sequential(nn.Linear(2, 1))
    compat.ignore_parameters(module, ["0.bias"])
    replica = nn.parallel.DistributedDataParallel(module)
    (replica(torch.ones(1, 2)).sum() * (1 + dist.get_rank())).backward()
    return module[0].weight.grad.tolist(), module[0].bias.grad.tolist()


def test_ignore_parameters():
    assert run_connected(2, reduced_gradients) == [([[1.5, 1.5]], [1.0]), ([[1.5, 1.5]], [2.0])]


def test_versions_of():
    tensor = torch.ones(2).requires_grad_() * 1
    versions = compat.versions_of(tensor)
    assert versions.untyped_storage().nbytes() == 0
    before = compat.version(versions)
    tensor[:1].add_(1)
    assert compat.version(versions) == compat.version(tensor) == before + 1


def test_hooks_saved_tensors():
    assert not compat.hooks_saved_tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert compat.hooks_saved_tensors()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        assert compat.hooks_saved_tensors()
    assert not compat.hooks_saved_tensors()


def divided_by_two():
    """Blocks of which one has a parameter of five rows, and a root that has none of its own."""
    torch.manual_seed(0)
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    for part in (*module, module):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    return module


def shards_placed():
    module = divided_by_two()
    shards = compat.shards_of(module[0])
    assert [one for one, _ in shards] == [*module[0].parameters()]
    assert compat.shards_of(module) == []
    before = module(torch.ones(2, 4))
    for parameter, data in compat.shards_of(module[0]):
        memory = torch.full_like(data, torch.nan)
        memory.copy_(data)
        compat.place_shard(module[0], parameter, memory)
        data.fill_(torch.nan)
    after = module(torch.ones(2, 4))
    same = [one.to_local().data_ptr() == data.data_ptr() for one, data in compat.shards_of(module[0])]
    return [data.numel() for _, data in shards], len(module[0].weight.to_local()), same, torch.equal(before, after)


def test_shards_of_and_place_shard(two):
    assert two.run(shards_placed) == [([12, 3], 3, [True, True], True), ([12, 3], 2, [True, True], True)]


def gathers_seen():
    module, seen = divided_by_two(), []
    undo = compat.around_gathers(module[0], lambda: seen.append("before"), lambda: seen.append("after"))
    x = torch.ones(2, 4, requires_grad=True)
    module(x).sum().backward()
    passes = list(seen)
    module[0].unshard()
    module[0].unshard()
    module[0].reshard()
    by_hand = seen[len(passes) :]
    undo()
    module(x).sum().backward()
    return passes, by_hand, len(seen) - len(passes) - len(by_hand)


def test_around_gathers(two):
    assert two.run(gathers_seen) == [(["before", "after"] * 2, ["before", "after"], 0)] * 2


def shards_brought(size):
    """What a module computes whose shards are brought as zeros, when FSDP2 reads them, and without that."""
    mesh = mesh_of((size,))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for part in (*module, module):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    seen = []

    @contextlib.contextmanager
    def bring(shards):
        seen.append([one.numel() for one in shards])
        yield [torch.zeros_like(one) for one in shards]
        seen.append("read")

    before = module(torch.ones(2, 4))
    undo = compat.around_gathers(module[1], lambda: seen.append("before"), lambda: seen.append("after"), bring)
    # As those who are around gathers and gather the group themselves.
    again = compat.around_gathers(module[1], lambda: None, lambda: None, bring)
    zeros = module(torch.ones(2, 4))
    again()
    undo()
    return seen, not zeros.any(), torch.equal(module(torch.ones(2, 4)), before)


@pytest.mark.parametrize("size", [1, 2])
def test_around_gathers_that_bring_shards(two, size):
    elements = [16 // size, 4 // size]
    order = ["before", elements, "read", "after"]
    if size == 2:
        assert two.run(shards_brought, 2) == [(order, True, True)] * 2
    else:
        assert run_connected(1, shards_brought, 1) == [(order, True, True)]


def reductions_seen(hooked):
    """What is told of gradients of two backwards, of which the second adds; and whether they were waited for."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    groups.connect(TorchElasticEnvironment(), "cpu:gloo,cuda:nccl", device, timedelta(seconds=60))
    mesh = init_device_mesh("cuda", (2,))
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for part in (*module, module):
        fully_shard(part, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    names = {parameter: name for name, parameter in module.named_parameters()}
    seen, hooks = [], []
    if hooked:
        module[1].weight.register_post_accumulate_grad_hook(lambda one: hooks.append(float(one.grad.to_local().sum())))

    def reduced(parameters, wait):
        wait()
        seen.append({names[one]: float(one.grad.to_local().sum()) for one in parameters})

    undo = compat.around_reductions(module[1], reduced)
    x = torch.ones(8, 64, device=device)
    for _ in range(2):
        module(x).sum().backward()
    undo()
    module(x).sum().backward()
    return seen, hooks, float(module[1].weight.grad.to_local().sum())


@pytest.mark.gpu
@pytest.mark.parametrize("hooked", [False, True])
def test_around_reductions(two, hooked):
    for seen, hooks, last in two.run(in_own_group, reductions_seen, hooked):
        assert [[*one] for one in seen] == [["1.weight", "1.bias"]] * 2
        first, second = (one["1.weight"] for one in seen)
        assert (second, last) == (pytest.approx(2 * first), pytest.approx(3 * first))
        assert hooks == ([pytest.approx(first), pytest.approx(second), pytest.approx(last)] if hooked else [])


def collectives_intercepted():
    """Two linear layers, of which this rank runs one and rank 1 the other; what each entered, and the gradients."""
    module, seen = divided_by_two(), []
    compat.become_root(module)
    groups = [compat.GroupCollectives(part) for part in module]
    own = dist.get_rank()

    def unshard(index, issue):
        seen.append(("unshard", index))
        for joined, group in enumerate(groups):
            issue() if joined == index else group.join_unshard()

    def reduce(index, issue):
        seen.append(("reduce", index, groups[index].unreduced(), groups[index].reduces))
        groups[index].keep_unreduced()

    def end():
        seen.append(("end", [group.is_through_backward for group in groups]))
        for group in groups:
            seen.append(group.reduce((0, 1), own=True))

    undo = [group.intercept(partial(unshard, index), partial(reduce, index)) for index, group in enumerate(groups)]
    undo.append(compat.before_backward_ends(module, end))
    module[own](torch.ones(2, 4 + own, requires_grad=True)).sum().backward()
    gradients = [parameter.grad.full_tensor().mean().item() for parameter in module.parameters()]
    groups[own].drop_gradient(0)
    dropped = next(module[own].parameters()).grad
    for one in undo:
        one()
    module.zero_grad()
    module(torch.ones(2, 4, requires_grad=True)).sum().backward()
    return seen, gradients, dropped, [group.parameters for group in groups], compat.has_group(module)


def test_group_collectives_and_before_backward_ends_and_has_group(two):
    for own, (seen, gradients, dropped, parameters, root_has_some) in enumerate(two.run(collectives_intercepted)):
        other = 1 - own
        assert seen == [
            *[("unshard", own)] * 2,
            ("reduce", own, (0, 1), True),
            ("end", [own == 0, own == 1]),
            *[([0, 1], [0, 1] if index == own else []) for index in range(2)],
            # As FSDP ends a backward that has not come past a group.
            ("reduce", other, (), True),
        ]
        # Two samples of ones, and zeros from the rank that has not run the layer.
        assert gradients == [1.0] * 4
        assert dropped is None
        assert parameters == [2, 2]
        assert not root_has_some


def divided_elsewhere():
    """A part in DRAM of a tensor whose mesh is of another device; torch has none that is always there but meta."""
    mesh = DeviceMesh("meta", [0, 1])
    like = DTensor.from_local(torch.empty(3, 4, device="meta"), mesh, [Shard(0)], run_check=False)
    part = torch.ones(3, 4, dtype=torch.bfloat16)
    whole = compat.divided_as(like, part)
    moved = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
    return (
        (whole.shape, whole.dtype, whole.placements) == (like.shape, part.dtype, like.placements),
        whole.to_local().data_ptr() == part.data_ptr(),
        moved.device.type,
    )


def second_derivative():
    compat.differentiate_placing_twice()
    compat.differentiate_placing_twice()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4), torch.randn(6, 4)

    def slopes(given, of):
        out = given(x.requires_grad_()) @ of.t()
        (slope,) = torch.autograd.grad(out.tanh().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(slope.square().sum(), of)
        return found

    plain = slopes(lambda tensor: tensor, weight.clone().requires_grad_())
    local = weight.chunk(2)[dist.get_rank()].clone()
    placed = DTensor.from_local(local, mesh, [Shard(0)]).requires_grad_()
    found = slopes(lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()], run_check=False), placed)
    torch.testing.assert_close(found.full_tensor(), plain)
    return True


def test_differentiate_placing_twice(two):
    assert all(two.run(second_derivative))


def test_divided_as(two):
    two.run(connect)
    # Should the last no longer be so, `from_local` can take its place.
    assert two.run(divided_elsewhere) == [(True, True, "meta")] * 2


class Hooked(BoringModel):
    def on_train_start(self):
        HOOKS.append("runs")


HOOKS: list[str] = []


def test_around_hooks(tmp_path):
    @contextlib.contextmanager
    def around(name):
        HOOKS.append(f"before {name}")
        yield
        HOOKS.append(f"after {name}")

    trainer = Trainer(
        accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    HOOKS.clear()
    with compat.around_hooks(trainer, around):
        trainer.fit(Hooked())
    place = HOOKS.index("runs")
    assert HOOKS[place - 1 : place + 2] == ["before on_train_start", "runs", "after on_train_start"]
    assert {"before optimizer_step", "before on_after_backward", "before on_before_zero_grad"} <= {*HOOKS}
    assert not any("training_step" in hook for hook in HOOKS)
    assert "profile" not in vars(trainer.profiler)


def shards_and_gathered():
    module = nn.Linear(2, 2)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    module.unshard()
    gathered = module.weight
    with compat.sharded_in_place(module):
        shard = module.weight
    return isinstance(gathered, DTensor), isinstance(shard, DTensor), module.weight is gathered


def test_sharded_in_place():
    assert run_connected(1, shards_and_gathered) == [(False, True, True)]


def test_frame_of():
    held, running = threading.Event(), threading.Event()

    def run():
        running.set()
        held.wait()

    thread = threading.Thread(target=run)
    assert compat.frame_of(thread) is None
    thread.start()
    running.wait()
    names = [frame.f_code.co_name for frame, _ in traceback.walk_stack(compat.frame_of(thread))]
    held.set()
    thread.join()
    assert "run" in names


def test_target_of():
    assert compat.target_of(threading.Thread(target=fail)) is fail
    assert compat.target_of(threading.Thread()) is None
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()
    assert compat.target_of(thread) is None


def test_is_collective():
    seen = []

    class Operators(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.name(), compat.is_collective(func)))
            return func(*args, **(kwargs or {}))

    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    try:
        with Operators():
            dist.all_reduce(torch.ones(1))
            dist.send(torch.ones(1), 1)
            torch.ones(1).add_(1)
    finally:
        dist.destroy_process_group()
    assert {name: said for name, said in seen if "ones" not in name} == {
        "c10d::allreduce_": True, "c10d::send": False, "aten::add_.Tensor": False,
    }  # fmt: skip


def saved_to_a_directory(path):
    mesh = init_device_mesh("cpu", (1,))
    checkpoint.save({"weight": DTensor.from_local(torch.ones(2), mesh, [Shard(0)])}, checkpoint_id=path)


def test_pickled_globals(tmp_path):
    run_connected(1, saved_to_a_directory, tmp_path)
    named = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        Reader(file).load()
    private = {(module, name) for module, name in named if name.startswith("_")}
    # All of that module is what a directory's metadata is made of.
    assert compat.pickled_globals() == {one for one in private if one[0] != "torch.distributed.checkpoint.metadata"}


def test_calls_collective():
    # How each collective, and what is none, looks from outside is in test_waiting.py, by threads that wait there.
    assert not compat.calls_collective(sys._getframe())


def test_is_of_group():
    assert not compat.is_of_group(sys._getframe())


def looked_at_by_groups():
    """A group as it is gathered, written into, reduced and resharded."""
    compat.init_process_group(TorchElasticEnvironment(), "gloo", torch.device("cpu"), timedelta(seconds=60))
    rank = dist.get_rank()
    block = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        block.weight.copy_(torch.arange(9.0).view(3, 3))
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    compat.become_root(block)
    (one,) = compat.grouped_parameters(block)
    assert isinstance(one, compat.GroupedParameter)
    assert (one.name, one.leaf, one.is_gathered, one.is_pinned) == ("weight", None, False, False)
    seen = []

    @contextlib.contextmanager
    def told(word):
        seen.append(word)
        yield
        seen.append(word)

    undo = compat.around_sharding(
        block,
        gathered=lambda: told("gathers"),
        resharding=lambda: seen.append("reshards"),
        reducing=lambda: told("reduces"),
    )
    block.unshard()
    version = compat.version(one.leaf)
    one.set_values(one.values * 2)
    assert compat.version(one.leaf) == version
    assert block.weight is one.leaf
    assert one.is_gathered
    assert not one.is_cast
    assert torch.equal(one.leaf, torch.arange(9.0).view(3, 3) * 2)
    assert torch.equal(one.own_memory, one.memory * 2)
    assert one.gathered_memory.numel() == 2 * one.memory.numel()
    assert one.places == [(block, "weight")]
    one.leaf.grad = torch.full((3, 3), float(rank))
    compat.reduce_gradients(block)
    assert seen == ["gathers", "gathers", "reduces", "reshards", "reduces"]
    undo()
    assert block.weight is one.shard
    assert compat.version(compat.local_tensor(one.shard)) >= 0
    block.unshard()
    return seen[5:], one.shard.grad.full_tensor().unique().tolist()


def test_grouped_parameters_around_sharding_and_reduce_gradients(two):
    assert two.run(looked_at_by_groups) == [([], [0.5])] * 2


def test_around_engine():
    x, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    asked = []

    def instead(engine, inputs, *, create_graph, accumulate):
        asked.append((create_graph, accumulate))
        return engine(tuple(other if one is x else one for one in inputs))

    undo = compat.around_engine(instead)
    try:
        from torch.autograd import grad

        (found,) = grad((3 * other).sum(), [x])
        assert found.tolist() == [3, 3]
        (3 * other).sum().backward(inputs=[x])
        (3 * other).sum().backward()
    finally:
        undo()
    assert asked == [(False, False), (False, True)]
    assert (x.grad, other.grad.tolist()) == (None, [6, 6])
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad((3 * other).sum(), [x])
