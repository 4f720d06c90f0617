import dataclasses
import os
import pty
import resource
import subprocess
import sys

import psutil
import pytest
import torch
from ranks import connected, ranks, run_connected
from rates import measure

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware, Link
from lightning_largescale.hardware.calibrate import _slowest

SMALL = [(64, 64, 64)]


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    monkeypatch.setattr(Hardware, "calibrate", measure)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LARGESCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def detected(**layout):
    """This machine, said to have little memory, so that little is taken for measuring."""
    return dataclasses.replace(Hardware.detect(accelerator="cpu", **layout), memory_free_bytes=2**28)


def test_one_process(capfd):
    machine = detected()
    measured = machine.calibrate(seconds=0.3, matmul_sizes=SMALL)
    rates = measured.rates
    assert dataclasses.replace(measured, rates=None) == machine
    assert rates.matmul["float32"] > 0
    assert rates.memory_bandwidth > 0
    assert (rates.all_gather, rates.reduce_scatter, rates.all_reduce) == (None, None, None)
    assert (rates.host_to_device, rates.device_to_host) == (None, None)
    assert Hardware.from_dict(measured.to_dict()) == measured
    assert capfd.readouterr() == ("", "")  # no bar where there is no terminal


def test_the_second_time_comes_from_the_cache(cache):
    first = detected().calibrate(seconds=0.3, matmul_sizes=SMALL)
    assert len(list(cache.iterdir())) == 1
    assert detected().calibrate(seconds=0.3, matmul_sizes=SMALL).rates == first.rates
    detected().calibrate(seconds=0.3, matmul_sizes=[(32, 64, 64)])
    assert len(list(cache.iterdir())) == 2


def test_an_unwritable_cache_is_no_failure(cache):
    cache.write_text("not a folder")
    assert detected().calibrate(seconds=0.2, matmul_sizes=SMALL).rates is not None


def test_one_process_for_the_ranks_of_a_node():
    rates = detected(ranks_per_node=2).calibrate(seconds=0.3, matmul_sizes=SMALL).rates
    assert rates.all_gather.bandwidth > 0


def calibrated():
    machine = detected(ranks_per_node=torch.distributed.get_world_size())
    return [machine.calibrate(seconds=0.5, matmul_sizes=SMALL).rates for _ in range(2)]


def test_all_ranks_get_the_rates_of_the_slowest(cache):
    first, second = run_connected(2, calibrated)
    assert first[0] == first[1] == second[0] == second[1]  # measured, then from rank 0's cache
    assert first[0].all_reduce.bandwidth > 0
    assert len(list(cache.iterdir())) == 1


def without_cache_on_rank_1(folder):
    if torch.distributed.get_rank() == 1:
        os.environ["LARGESCALE_CACHE"] = folder
    return calibrated()[1]


def test_rank_0_decides_what_is_in_the_cache(tmp_path):
    first, second = run_connected(2, without_cache_on_rank_1, str(tmp_path / "other"))
    assert first == second
    assert not (tmp_path / "other").exists()


def without_memory_on_rank_1():
    machine = detected(ranks_per_node=2)
    if torch.distributed.get_rank() == 1:
        # What the process has, and no more: the memory it wants for measuring is refused.
        held = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (held + 2**22, resource.RLIM_INFINITY))
    return machine.calibrate(seconds=0.5, matmul_sizes=SMALL)


def test_a_rank_that_fails_takes_the_others_out_of_it(cache):
    with ranks(2) as own:
        first, second = (trace for _, trace, _ in own.answers(connected, without_memory_on_rank_1))
    assert "RuntimeError: rank 1 failed while the hardware was measured" in first
    assert "RuntimeError: rank 1 failed while the hardware was measured" in second
    assert "was the direct cause" in second  # its own error, with its own traceback
    assert "was the direct cause" not in first
    assert not cache.exists()


def each_alone():
    machine = detected(ranks_per_node=1, nodes=1).calibrate(seconds=0.2, matmul_sizes=SMALL)
    return machine.world_size, machine.rates.all_reduce


def mismatched():
    return dataclasses.replace(detected(), ranks_per_node=3).calibrate(seconds=0.1)


def test_ranks_of_another_group_are_refused():
    with ranks(2) as own:
        for error, _, _ in own.answers(connected, mismatched):
            assert isinstance(error, PlanError)
            assert "the hardware has 3 ranks and the process group 2" in str(error)


def test_one_process_is_measured_alone_also_beside_others():
    assert run_connected(2, each_alone) == [(1, None)] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Hardware.named("H100-80GB").calibrate(), "hardware of origin 'catalogue' cannot be measured"),
        (lambda: detected(nodes=2).calibrate(), "the links between 2 nodes cannot be measured by one process"),
        (lambda: detected().calibrate(seconds=0), "seconds=0 is not accepted; give a number above 0"),
        (lambda: detected().calibrate(seconds="5"), "seconds='5' is not accepted"),
        (lambda: detected().calibrate(matmul_sizes=[]), r"matmul_sizes=\[\] is not accepted"),
        (lambda: detected().calibrate(matmul_sizes=5), "matmul_sizes=5 is not accepted; give"),
        (lambda: detected().calibrate(matmul_sizes=[5]), r"matmul_sizes=\[5\] is not accepted"),
        (lambda: detected().calibrate(matmul_sizes="abc"), "matmul_sizes='abc' is not accepted"),
        (lambda: detected().calibrate(matmul_sizes=[(1, 2)]), r"matmul_sizes=\[\(1, 2\)\] is not accepted"),
        (lambda: detected().calibrate(matmul_sizes=[(1, 2, 0)]), "give .m, k, n. of whole numbers above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(PlanError, match=message):
        call()


def test_the_slowest_rank_counts():
    fast = {"matmul": {"float32": 4.0, "bfloat16": 2.0}, "memory_bandwidth": 3.0, "disk_read": 1.0}
    slow = {"matmul": {"float32": 2.0}, "memory_bandwidth": 5.0}
    assert _slowest([fast, slow]) == {"matmul": {"float32": 2.0}, "memory_bandwidth": 3.0}
    links = [
        {"all_gather": Link(latency_seconds=1, bandwidth=9)},
        {"all_gather": Link(latency_seconds=2, bandwidth=10)},
    ]
    assert _slowest(links) == {"all_gather": Link(latency_seconds=2, bandwidth=9)}


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_on_a_terminal(monkeypatch, progress):
    terminal, end = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(end, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        detected().calibrate(seconds=0.1, matmul_sizes=SMALL, progress=progress)
        stderr.write(".")
        stderr.flush()
        shown = os.read(terminal, 2**16).decode()
    os.close(terminal)
    assert ("Measuring the hardware" in shown) == progress


def test_measuring_needs_no_lightning():
    program = (
        "import sys; from lightning_largescale.hardware import Hardware;"
        "Hardware.detect(accelerator='cpu').calibrate(seconds=0.1, matmul_sizes=[(64, 64, 64)]);"
        "print('lightning' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


@pytest.mark.gpu(real=True)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_cuda_device():
    machine = Hardware.detect(ranks_per_node=1)
    reserved = torch.cuda.memory_reserved()
    rates = machine.calibrate(seconds=2.0).rates
    assert set(rates.matmul) == {"float32", "bfloat16", "float16"}
    assert rates.matmul["bfloat16"] > rates.matmul["float32"]
    assert rates.memory_bandwidth > 1e10
    assert rates.host_to_device.bandwidth > 1e8
    assert torch.cuda.memory_reserved() <= reserved + 2**22


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_within_the_memory_that_the_process_may_have():
    machine = Hardware.detect(accelerator="cuda", ranks_per_node=1)
    allowed, (_, total) = torch.cuda.memory_reserved() + 96 * 2**20, torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        assert machine.calibrate(seconds=0.3, matmul_sizes=SMALL).rates.memory_bandwidth > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
