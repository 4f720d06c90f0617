"""Which group, and which page of state, a plan keeps in which tier."""

import pytest
from planner.builders import MIB, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.placement import place, whole_pages
from lightning_largescale.planner.sizes import Sizes


def placement(kind="cuda", work=None, **fields):
    return place(Sizes(work or workload(), Plan(**fields), kind))


@pytest.mark.parametrize(
    ("amount", "kept"), [(None, 0), (0, 0), (31, 0), (32, 32), (70, 64), (99, 96), (100, 100), (2**40, 100)]
)
def test_whole_pages(amount, kept):
    assert whole_pages(100 * MIB, amount if amount is None else amount * MIB) == kept * MIB


def test_groups_stay_from_the_last_then_go_to_dram():
    found = placement(offload_parameters="nvme", resident_parameter_bytes=16 * MIB, cpu_parameter_bytes=16 * MIB)
    assert found.groups == {"blocks.0": "nvme", "blocks.1": "nvme", "blocks.2": "cpu"}
    assert found.away == {"blocks.0", "blocks.1", "blocks.2"}
    on_cpu = placement("cpu", offload_parameters="nvme", cpu_parameter_bytes=16 * MIB)
    assert on_cpu.away == {"blocks.0", "blocks.1", "blocks.2"}
    assert placement("cpu", offload_parameters="cpu").away == frozenset()


def test_state_in_pages():
    found = placement(
        offload_optimizer="nvme", resident_optimizer_bytes=33 * MIB, cpu_optimizer_bytes=64 * MIB, dp_shard=2
    )
    # Of 72 MiB one page stays; all that is left fits DRAM.
    assert found.state == {"cpu": 40 * MIB}
    assert placement(offload_optimizer="nvme").state == {"nvme": 144 * MIB}
    assert placement("cpu", offload_optimizer="cpu").state_away == 0
    assert placement(work=workload(stage="validate"), offload_optimizer="nvme").state == {}


def test_activations_of_all_blocks_or_of_some():
    assert placement(offload_activations="cpu").blocks == {*workload().blocks}
    assert placement(offload_activations="cpu", offloaded_blocks=("blocks.1",)).blocks == {"blocks.1"}
    assert placement().activations is None
    assert placement(work=workload(stage="predict"), offload_activations="cpu").activations is None
