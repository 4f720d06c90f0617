import pytest

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.catalogue import CONTEXT_BYTES, DEVICES

GB = 10**9


def test_a_node_of_eight():
    machine = Hardware.named("8xH100-80GB", nodes=4)
    assert (machine.kind, machine.origin, machine.world_size) == ("cuda", "catalogue", 32)
    assert machine.memory_bytes == 80 * GB
    assert machine.memory_free_bytes == 80 * GB - CONTEXT_BYTES
    assert machine.interconnect == "NVLink"
    assert machine.dram_bytes == 250 * GB
    assert machine.cores == 112
    assert machine.rates.matmul["bfloat16"] == pytest.approx(989.4e12)
    assert machine.rates.memory_bandwidth == pytest.approx(3.35e12)
    assert machine.rates.host_to_device.bandwidth == 64 * GB


def test_links_are_of_the_slowest_hop():
    one_node = Hardware.named("8xH100-80GB").rates.all_gather
    assert one_node.bandwidth == 450 * GB
    across = Hardware.named("8xH100-80GB", nodes=2).rates.all_gather
    assert across.bandwidth == 400 * GB  # eight cards of 400 Gb/s
    assert one_node.latency_seconds < across.latency_seconds < 14e-6
    assert Hardware.named("H100-80GB", nodes=2).rates.all_gather.bandwidth == 50 * GB
    assert Hardware.named("2xL4-24GB").rates.all_reduce.bandwidth == 32 * GB
    assert Hardware.named("8xL4-24GB", nodes=4).rates.all_gather.bandwidth == 12.5 * GB  # of the whole node
    assert Hardware.named("8xL4-24GB", nodes=4).rates.node_all_gather == Hardware.named("8xL4-24GB").rates.all_gather
    assert Hardware.named("8xL4-24GB").rates.node_all_gather is None  # all ranks are those of the node
    assert Hardware.named("H100-80GB", nodes=2).rates.node_reduce_scatter is None
    assert Hardware.named("2xL4-24GB").interconnect == "PCIe"


def test_one_device_has_no_collectives():
    machine = Hardware.named("V100-32GB")
    assert machine.world_size == 1
    assert machine.rates.all_gather is None
    assert machine.interconnect is None
    assert "bfloat16" not in machine.rates.matmul


@pytest.mark.parametrize("text", [" 2 x h100-80gb ", "2XH100-80GB", "2xH100-80GB"])
def test_names_are_read_as_people_write_them(text):
    assert Hardware.named(text) == Hardware.named("2xH100-80GB")


@pytest.mark.parametrize("name", DEVICES)
def test_every_entry_is_plausible_and_sourced(name, tmp_path):
    device = DEVICES[name]
    assert name.endswith(f"-{device.memory_gb}GB")
    assert device.source
    assert device.node_source
    rates = list(device.tflops.values())
    assert rates == sorted(rates), "float32 is the slowest, 16 bits the fastest"
    machine = Hardware.named(f"8x{name}", nodes=2)
    machine.save(tmp_path / "hw.json")
    assert Hardware.load(tmp_path / "hw.json").rates == machine.rates


@pytest.mark.parametrize(
    ("text", "nodes", "message"),
    [
        ("8xH1000", 1, "'H1000' is not in the table of published figures; accepted: .*H100-80GB, .*A100-40GB"),
        ("", 1, "'' names no hardware; accepted: a count, 'x' and one of"),
        (8, 1, "8 names no hardware"),
        ("0xH100-80GB", 1, "'0xH100-80GB' names 0 devices; give 1 or more"),
        ("8xH100-80GB", 0, "nodes=0 is not accepted"),
        ("8xH100-80GB", "4", "nodes='4' is not accepted"),
    ],
)
def test_what_is_not_there_is_refused(text, nodes, message):
    with pytest.raises(PlanError, match=message):
        Hardware.named(text, nodes=nodes)
