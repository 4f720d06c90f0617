"""Copies between DRAM and a device."""

import pytest
import torch

from lightning_largescale.offload.lanes import Lanes
from lightning_largescale.offload.mapped_memory import Memory

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@devices
def test_what_is_brought_is_a_copy_in_the_same_layout(device):
    lanes = Lanes(torch.device(device))
    kept = {"flat": torch.arange(12.0), "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    found = lanes.bring(kept)
    for key, source in kept.items():
        assert found[key].device.type == device
        assert found[key].stride() == source.stride()
        assert torch.equal(found[key].cpu(), source)
        found[key].zero_()
        assert source.any()


@devices
def test_copies_come_after_what_was_computed(device):
    lanes = Lanes(torch.device(device))
    memory = Memory(4 * 2**20, pinned=lanes.pinned)
    here, there = memory.tensor(torch.float32, (1024, 1024)), torch.ones(1024, 1024, device=device)
    for _ in range(20):
        there = there @ torch.eye(1024, device=device) + 1
    transfer = lanes.fetch([(here, there)])
    transfer.wait()
    assert here.eq(21).all()
    here.fill_(3)
    transfer = lanes.put([(there, here)])
    transfer.wait()
    assert transfer.over
    assert there.eq(3).all()
