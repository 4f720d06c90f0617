import contextlib
import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Disk, Hardware, Link, Rates

LINK = Link(latency_seconds=1e-6, bandwidth=1e9)


def hardware(**fields):
    known = {
        "kind": "cpu",
        "name": "a machine",
        "memory_bytes": 4 << 30,
        "memory_free_bytes": 3 << 30,
        "nodes": 2,
        "ranks_per_node": 4,
        "cores": 8,
        "dram_bytes": 4 << 30,
        "dram_available_bytes": 3 << 30,
        "disks": (Disk(path="/tmp", filesystem="ext4", free_bytes=10, refused=None),),
        "rates": Rates(
            matmul={"float32": 1e10}, memory_bandwidth=1e10, fresh_memory=2e9, all_gather=LINK, disk_read=1e9
        ),
    }
    return Hardware(**{**known, **fields})


def test_world_size_is_the_number_of_processes():
    assert hardware().world_size == 8


@pytest.mark.parametrize("rates", [None, hardware().rates])
def test_file_and_dict_read_back_equal(tmp_path, rates):
    machine = hardware(rates=rates, interconnect="NVLink", kind="cuda")
    assert Hardware.from_dict(machine.to_dict()) == machine
    assert Hardware.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine
    machine.save(tmp_path / "hw.json")
    assert Hardware.load(tmp_path / "hw.json") == hardware(
        rates=rates, interconnect="NVLink", kind="cuda", origin="file"
    )


def test_a_file_from_before_links_inside_a_node_is_read():
    fields = hardware().to_dict()
    del fields["rates"]["node_all_gather"], fields["rates"]["node_reduce_scatter"]
    assert Hardware.from_dict(fields) == hardware()


def test_travels_between_processes():
    machine = hardware()
    assert pickle.loads(pickle.dumps(machine)) == machine
    assert copy.deepcopy(machine) == machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "the hardware is of version 2 and this release reads up to 1"),
        ({"version": "1"}, r"hardware.version='1' is not accepted; give a whole number, 1 or more\."),
        ({"kind": "tpu"}, "hardware.kind='tpu' is not accepted; give 'cpu' or 'cuda'"),
        ({"kind": ["cpu"]}, r"hardware.kind=\['cpu'\] is not accepted"),
        ({"nodes": 0}, "hardware.nodes=0 is not accepted; give a whole number, 1 or more"),
        ({"cores": True}, "hardware.cores=True is not accepted"),
        ({"memory_bytes": -1}, "hardware.memory_bytes=-1 is not accepted; give a whole number, 0 or more"),
        ({"memory_free_bytes": 1.5}, "hardware.memory_free_bytes=1.5 is not accepted"),
        ({"name": 3}, "hardware.name=3 is not accepted; give text"),
        ({"disks": "/tmp"}, "hardware.disks='/tmp' is not accepted; give an array"),
        ({"disks": [3]}, r"disks\[0\]=3 is not accepted; give an object of fields"),
        ({"disks": [{"path": "/tmp"}]}, r"disks\[0\] lacks the field 'filesystem'"),
        ({"colour": "red"}, "colour='red' is no field of hardware; accepted: version, kind, name"),
        ({"rates": {"matmul": {}, "memory_bandwidth": 1}}, "rates.matmul={} .* 'float32' among them"),
        ({"rates": {"matmul": {"float32": 0}, "memory_bandwidth": 1}}, "rates.matmul={'float32': 0} is not accepted"),
        ({"rates": {"matmul": {"float32": 1}, "memory_bandwidth": "fast"}}, "rates.memory_bandwidth='fast' is not"),
        (
            {"rates": {"matmul": {"float32": 1}, "memory_bandwidth": 1, "all_reduce": {"bandwidth": 1}}},
            "rates.all_reduce lacks the field 'latency_seconds'",
        ),
        (
            {"rates": {"matmul": {"float32": 1}, "memory_bandwidth": 1, "disk_read": float("nan")}},
            "rates.disk_read=nan is not accepted",
        ),
    ],
)
def test_damaged_fields_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        Hardware.from_dict({**hardware().to_dict(), **change})


def test_a_missing_field_is_named():
    fields = hardware().to_dict()
    del fields["cores"]
    with pytest.raises(PlanError, match="hardware lacks the field 'cores'"):
        Hardware.from_dict(fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the hardware is no JSON"), ("{", "the hardware is no JSON"), ("[]", r"hardware=\[\] is not accepted")],
)
def test_damaged_files_are_refused_with_their_path(tmp_path, text, message):
    path = tmp_path / "hw.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=f"hw.json: {message}"):
        Hardware.load(path)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "hw.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"hw\.json: the hardware is no JSON"):
        Hardware.load(tmp_path / "hw.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere.json' cannot be read \(No such file or directory\)"):
        Hardware.load(tmp_path / "nowhere.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from(sorted(hardware().to_dict())), value=json_values)
def test_any_value_in_any_field_is_read_or_refused(name, value):
    fields = {**hardware().to_dict(), name: value}
    with contextlib.suppress(PlanError):
        assert Hardware.from_dict(fields).to_dict()["version"] == 1
