import threading

import pytest
import torch

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware.hops import lone_links


@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_gloo_between_threads(ranks):
    threads = threading.active_count()
    links = lone_links("cpu", ranks, 0.1)
    assert set(links) == {"all_gather", "reduce_scatter", "all_reduce"}
    assert all(1e4 < link.bandwidth < 1e12 for link in links.values())
    assert threading.active_count() == threads


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are several CUDA devices")
def test_devices_that_are_not_here():
    with pytest.raises(PlanError, match="the links of 8 ranks cannot be measured by one process here"):
        lone_links("cuda", 8, 0.1)


@pytest.mark.gpu(real=True)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_real_devices():
    links = lone_links("cuda", 2, 0.1)
    assert links["all_gather"] == links["all_reduce"]
    assert 1e8 < links["all_gather"].bandwidth < 1e13
