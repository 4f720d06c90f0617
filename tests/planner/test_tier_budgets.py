import dataclasses

from planner.builders import tiered

from lightning_largescale.hardware import Disk
from lightning_largescale.hardware.disks import nvme_disk
from lightning_largescale.planner.tier_budgets import shortfalls, tier_budgets

GIB = 2**30


def test_a_disk_is_shared_by_the_ranks_of_a_node():
    assert tier_budgets(tiered(4, disk=40 * GIB)) == {"nvme": 10 * GIB}
    assert tier_budgets(dataclasses.replace(tiered(4, disk=40 * GIB), nodes=2)) == {"nvme": 10 * GIB}


def test_the_largest_disk_that_is_not_refused():
    disks = (
        Disk(path="/a", filesystem="ext4", free_bytes=1),
        Disk(path="/b", filesystem="ext4", free_bytes=3),
        Disk(path="/c", filesystem="tmpfs", free_bytes=9, refused="it is memory"),
    )
    assert nvme_disk(disks).path == "/b"
    assert nvme_disk(disks[2:]) is None
    assert tier_budgets(dataclasses.replace(tiered(), disks=disks[2:])) == {}


def test_dram_is_a_tier_of_cuda_only():
    assert tier_budgets(tiered(kind="cuda", disk=0, dram=7)) == {"cpu": 7}
    assert tier_budgets(tiered(disk=0)) == {}


def test_tiers_without_rates_are_left_out():
    machine = tiered(kind="cuda", dram=7)
    assert set(tier_budgets(machine)) == {"cpu", "nvme"}
    slow = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, disk_write=None))
    assert tier_budgets(slow) == {"cpu": 7}
    for name in ("device_to_host", "host_memory_bandwidth"):
        apart = dataclasses.replace(machine, rates=dataclasses.replace(machine.rates, **{name: None}))
        assert tier_budgets(apart) == {}
    assert tier_budgets(dataclasses.replace(machine, rates=None)) == {}


def test_what_is_lacking():
    assert shortfalls({"device": 5, "nvme": 9}, {"device": 7, "nvme": 6}) == {"nvme": 3}
    assert shortfalls({"device": 5, "cpu": 1}, {"device": 5}) == {"cpu": 1}
    assert shortfalls({"device": 5}, {"device": 5}) == {}
