import os
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_largescale.hardware.disks import direct_file
from lightning_largescale.hardware.measure import (
    _ladder,
    copy_links,
    disk_rates,
    fit_link,
    fresh_memory,
    matmul_rates,
    memory_bandwidth,
)

CPU = torch.device("cpu")
MIB = 2**20


def test_matmul_rates_leave_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rates = matmul_rates(CPU, [(64, 128, 96), (200, 30, 7)], 0.1, most_bytes=MIB)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(rates) <= {"float32", "bfloat16"}
    assert 1e6 < rates["float32"] < 1e14


def test_a_product_too_large_for_memory_or_time_is_measured_smaller():
    start = time.perf_counter()
    assert matmul_rates(CPU, [(2**20, 2**20, 2**20)], 0.2, most_bytes=MIB)["float32"] > 1e6
    assert time.perf_counter() - start < 60  # itself it would take years


@given(st.tuples(*[st.integers(1, 10**6)] * 3))
def test_the_ladder_ends_at_the_size_and_begins_small(size):
    rungs = list(_ladder(size))
    assert rungs[-1] == size
    m, k, n = rungs[0]
    assert 2 * m * k * n <= 2 * 128**3
    assert all(lower != upper for lower, upper in pairwise(rungs))
    assert all(small <= large for lower, upper in pairwise(rungs) for small, large in zip(lower, upper, strict=True))


@pytest.mark.parametrize("most_bytes", [1, 5 * MIB])
def test_fresh_memory(most_bytes):
    assert 1e7 < fresh_memory(0.05, most_bytes=most_bytes) < 1e14


def test_memory_bandwidth():
    assert 1e7 < memory_bandwidth(CPU, 0.05, most_bytes=8 * MIB) < 1e13


@given(latency=st.floats(1e-7, 1e-2), bandwidth=st.floats(1e6, 1e12))
def test_a_link_is_found_from_its_own_times(latency, bandwidth):
    link = fit_link([(size, latency + size / bandwidth) for size in (2**10, 2**15, 2**20, 2**24)])
    # What one of the two adds to no size's time cannot be found.
    assert link.bandwidth == pytest.approx(bandwidth, rel=1e-3) or latency > 1e4 * 2**24 / bandwidth
    assert link.latency_seconds == pytest.approx(latency, rel=1e-3, abs=1e-5 * 2**10 / bandwidth)


@pytest.mark.parametrize(
    ("points", "latency", "bandwidth"),
    [
        ([(100, 2.0)], 0.0, 50.0),
        ([(100, 2.0), (1000, 1.0)], 0.0, 1000.0),  # the larger was faster: noise
        ([(100, 0.1), (1000, 10.0)], 0.0, pytest.approx(918, abs=1)),  # a latency below 0
    ],
)
def test_links_of_noise(points, latency, bandwidth):
    link = fit_link(points)
    assert (link.latency_seconds, link.bandwidth) == (latency, bandwidth)


def test_disk_rates_leave_nothing(tmp_path):
    try:
        with direct_file(tmp_path):
            pass
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    before = len(os.listdir("/proc/self/fd"))
    read, write = disk_rates(str(tmp_path), 0.05)
    assert 1e5 < read < 1e12
    assert 1e5 < write < 1e12
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_disk_rates_of_no_disk(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        disk_rates(str(tmp_path / "none"), 0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_cuda_device():
    device = torch.device("cuda", torch.cuda.current_device())
    rates = matmul_rates(device, [(4096, 4096, 4096)], 0.5, most_bytes=2**30)
    assert set(rates) == {"float32", "bfloat16", "float16"}
    assert 1e9 < rates["float32"] < 1e16
    assert 1e9 < memory_bandwidth(device, 0.1, most_bytes=2**30) < 1e14
    for link in copy_links(device, 0.1, most_bytes=2**30):
        assert 1e8 < link.bandwidth < 1e12
        assert 0 <= link.latency_seconds < 0.01
