import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.detect import cpu_name, interconnect, layout


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def environment(world):
    found = LightningEnvironment()
    found.set_world_size(world)
    return found


def test_cpu():
    machine = Hardware.detect(accelerator="cpu")
    assert (machine.kind, machine.nodes, machine.ranks_per_node, machine.origin) == ("cpu", 1, 1, "detected")
    assert machine.cores == len(os.sched_getaffinity(0))
    assert 0 < machine.memory_free_bytes <= machine.memory_bytes
    assert (machine.memory_bytes, machine.memory_free_bytes) == (machine.dram_bytes, machine.dram_available_bytes)
    assert machine.name
    assert machine.interconnect is None
    assert machine.rates is None


def test_memory_is_divided_among_the_ranks_of_a_node():
    one = Hardware.detect(accelerator="cpu")
    four = Hardware.detect(accelerator="cpu", ranks_per_node=4, nodes=2)
    assert four.world_size == 8
    assert four.memory_bytes == one.memory_bytes // 4
    assert four.memory_free_bytes <= 0.3 * one.memory_free_bytes


def test_affinity_mask_counts():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert Hardware.detect(accelerator="cpu").cores == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("accelerator", ["mps", "tpu", "xla", 3])
def test_other_accelerators_are_refused(accelerator):
    with pytest.raises(PlanError, match=f"accelerator={accelerator!r} cannot be planned for; accepted: cpu, cuda"):
        Hardware.detect(accelerator=accelerator)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_cuda_that_is_not_there_is_refused(accelerator):
    with pytest.raises(PlanError, match=f"accelerator='{accelerator}' was given and torch sees no CUDA device"):
        Hardware.detect(accelerator=accelerator)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1, 1)),
        ({"devices": 8}, (1, 8)),
        ({"ranks_per_node": 2}, (1, 2)),
        ({"nodes": 3, "ranks_per_node": 2}, (3, 2)),
        ({"environment": environment(4)}, (1, 4)),
        ({"environment": environment(4), "nodes": 2}, (2, 2)),
        ({"environment": environment(4), "ranks_per_node": 1}, (4, 1)),
        ({"environment": environment(4), "ranks_per_node": 2, "nodes": 2}, (2, 2)),
    ],
)
def test_layout(given, expected):
    assert layout(**{"environment": None, "ranks_per_node": None, "nodes": None, "devices": 1, **given}) == expected


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LOCAL_WORLD_SIZE", "2", (4, 2)),
        ("SLURM_TASKS_PER_NODE", "4(x2)", (2, 4)),
        ("SLURM_TASKS_PER_NODE", "4,3", (1, 8)),  # uneven: taken as one node
        ("LOCAL_WORLD_SIZE", "3", (1, 8)),
    ],
)
def test_layout_from_the_launcher(monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    assert layout(environment(8), None, None, devices=1) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node=0 is not accepted; give a whole number, 1 or more"),
        ({"nodes": "2"}, "nodes='2' is not accepted"),
        ({"environment": environment(4), "ranks_per_node": 3}, "nodes=1, ranks_per_node=3 makes 3 and there are 4"),
        ({"environment": environment(4), "nodes": 3}, r"nodes=3, ranks_per_node=1 makes 3 and .* must be 4\."),
        ({"environment": environment(2), "nodes": 4}, "nodes=4, ranks_per_node=1 makes 4 and there are 2"),
    ],
)
def test_layouts_that_cannot_be(given, message):
    with pytest.raises(PlanError, match=message):
        layout(**{"environment": None, "ranks_per_node": None, "nodes": None, "devices": 1, **given})


def test_cpu_name(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_name(tmp_path) == "Some CPU @ 2 GHz"
    assert cpu_name(tmp_path / "none")


class FakeNvml:
    """As much of pynvml as is called, for pairs of devices with and without NVLink; not the library's behaviour."""

    NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, linked=(), fails=None):
        self.linked, self.fails, self.running = set(linked), fails, 0

    def nvmlInit(self):
        if self.fails == "init":
            raise self.NVMLError
        self.running += 1

    def nvmlShutdown(self):
        self.running -= 1

    def nvmlDeviceGetHandleByUUID(self, name):
        if self.fails == "handle":
            raise self.NVMLError
        return name

    def nvmlDeviceGetP2PStatus(self, one, other, index):
        assert index == self.NVML_P2P_CAPS_INDEX_NVLINK
        return 0 if (one, other) in self.linked else 5


@pytest.mark.parametrize(
    ("names", "nvml", "expected"),
    [
        (["a"], FakeNvml(), None),
        (["a", "b"], FakeNvml({("a", "b")}), "NVLink"),
        (["a", "b"], FakeNvml(), "PCIe"),
        (["a", "b", "c"], FakeNvml({("a", "b")}), "PCIe"),
        (["a", "b"], FakeNvml(fails="init"), None),
        (["a", "b"], FakeNvml(fails="handle"), None),
        (["a", "b"], None, None),
    ],
)
def test_interconnect(monkeypatch, names, nvml, expected):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert interconnect(names) == expected
    assert nvml is None or nvml.running == 0


def test_cuda_figures_are_the_devices(monkeypatch):
    fake = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
        mem_get_info=lambda: (70 << 30, 80 << 30),
        get_device_properties=lambda index: SimpleNamespace(uuid=f"uuid-{index}"),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml({("GPU-uuid-0", "GPU-uuid-1")}))
    machine = Hardware.detect()
    assert (machine.kind, machine.name, machine.ranks_per_node) == ("cuda", "NVIDIA H100 80GB HBM3", 2)
    assert (machine.memory_free_bytes, machine.memory_bytes) == (70 << 30, 80 << 30)
    assert machine.interconnect == "NVLink"


BEFORE_FORKS = """
import warnings

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_largescale as ls
from lightning_largescale.errors import PlanError

warnings.filterwarnings("ignore")


def fit(accelerator):
    strategy = ls.LargeScaleStrategy(ls.Plan(dp_shard=2), start_method="fork")
    options = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, enable_checkpointing=False)
    trainer = Trainer(strategy=strategy, accelerator=accelerator, devices=2, max_steps=1, **options)
    trainer.fit(BoringModel())


assert ls.Hardware.detect().kind == "cuda"
assert not torch.cuda.is_initialized()
fit("cuda")
fit("cpu")
torch.ones((), requires_grad=True).backward()
for accelerator in ("cpu", "cuda"):
    try:
        fit(accelerator)
    except PlanError as error:
        assert "autograd" in str(error)
    else:
        raise AssertionError("forks were started after a backward")
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_are_forked_after_a_detection_and_not_after_a_backward():
    subprocess.run([sys.executable, "-c", BEFORE_FORKS], check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_cuda_device():
    machine = Hardware.detect()
    assert machine.kind == "cuda"
    assert machine.ranks_per_node == torch.cuda.device_count()
    assert machine.memory_bytes == torch.cuda.get_device_properties().total_memory
    assert 0 < machine.memory_free_bytes <= machine.memory_bytes
    assert machine.interconnect in (None, "NVLink", "PCIe")
