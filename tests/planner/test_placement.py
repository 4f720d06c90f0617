"""Which group, and which page of state, a plan keeps in which tier."""

import dataclasses

import pytest
from planner.builders import MIB, hardware, mib, sizes, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import memory_of, peak_memory
from lightning_largescale.planner.placement import kept_elsewhere, whole_pages

DISK = {"offload_parameters": "nvme", "offload_optimizer": "nvme"}


def placement(kind="cuda", **fields):
    return sizes(kind, **fields).placement


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


def test_the_root_stays_and_so_do_the_last_groups_that_may():
    assert mib(sizes(offload_parameters="nvme").parameters_here) == 8
    assert mib(sizes(offload_parameters="nvme", resident_parameter_bytes=40 * MIB).parameters_here) == 8 + 2 * 16
    assert mib(sizes(offload_parameters="nvme", dp_shard=2).parameters_here) == 4
    # On the CPU DRAM is the device's own memory.
    assert mib(sizes(offload_parameters="cpu").parameters_here) == 8 + 64
    assert mib(sizes("cuda", offload_parameters="cpu").parameters_here) == 8


def test_state_stays_in_whole_pages():
    assert sizes(offload_optimizer="nvme").state_here == 0
    assert mib(sizes(offload_optimizer="nvme", resident_optimizer_bytes=70 * MIB).state_here) == 64
    assert mib(sizes(offload_optimizer="nvme", resident_optimizer_bytes=2**40).state_here) == 144
    assert mib(sizes(offload_optimizer="cpu").state_here) == 144
    assert sizes("cuda", offload_optimizer="cpu").state_here == 0
    assert sizes(work=workload(stage="validate")).state_here == 0


def test_what_is_kept_where():
    assert kept_elsewhere(sizes(**DISK)) == {"nvme": (144 + 2 * 64) * MIB}
    assert kept_elsewhere(sizes(**DISK, release_gradients=True)) == {"nvme": (144 + 64) * MIB}
    assert kept_elsewhere(sizes(offload_activations="nvme", offloaded_blocks=("blocks.2",))) == {"nvme": 64 * MIB}
    assert kept_elsewhere(sizes(offload_optimizer="cpu")) == {}
    assert kept_elsewhere(sizes("cuda", offload_optimizer="cpu")) == {"cpu": 144 * MIB}
    predict = workload(stage="predict", optimizers=())
    assert kept_elsewhere(sizes(work=predict, offload_parameters="nvme")) == {"nvme": 64 * MIB}


def test_what_goes_to_a_disk_from_cuda_passes_through_dram():
    found = sizes("cuda", **DISK, offload_activations="nvme")
    # Buffers of pages, shards and gradients of two groups, what two blocks saved, requests.
    assert mib(found.staging_bytes) == 6 * 32 + 2 * 16 + 2 * 16 + 2 * 64 + 8 * 4
    assert kept_elsewhere(found)["cpu"] == found.staging_bytes
    # One more of each that is fetched ahead; of four blocks the last one's activations stay.
    ahead = sizes("cuda", **DISK, offload_activations="nvme", prefetched_blocks=2)
    assert mib(ahead.staging_bytes - found.staging_bytes) == 16 + 64
    assert mib(kept_elsewhere(ahead)["nvme"]) == 144 + 2 * 64 + 3 * 64


def test_the_estimate_has_what_is_kept_elsewhere():
    estimate = memory_of(sizes(**DISK))
    assert estimate.elsewhere == {"nvme": (144 + 2 * 64) * MIB}
    assert estimate.terms["page buffers"] == 6 * 32 * MIB


@pytest.mark.parametrize("field", ["offload_parameters", "offload_optimizer", "offload_activations"])
def test_dram_of_a_cpu_saves_nothing(field):
    def live(plan):
        # Less is lost in the heap where it is kept without holes.
        terms = peak_memory(workload(), plan, hardware(1)).terms
        return sum(size for name, size in terms.items() if name != "allocator")

    assert live(Plan(**{field: "cpu"})) >= live(Plan())


def test_state_that_stays_in_dram_goes_through_no_buffer_of_a_page():
    # Two of four bytes of a page are then parameters and gradients.
    assert mib(sizes("cuda", offload_optimizer="cpu", cpu_optimizer_step=True).staging_bytes) == 6 * 16
    assert mib(sizes("cuda", offload_optimizer="nvme", cpu_optimizer_step=True).staging_bytes) == 6 * 32
    shards = sizes("cuda", offload_parameters="nvme", release_gradients=True)
    # A third, all 64 MiB of it, and shards and gradients of two groups.
    assert mib(shards.staging_bytes) == pytest.approx(64 + 2 * 16 + 2 * 16, abs=1)


def test_torch_pins_each_tensor_in_a_power_of_two():
    odd = tuple(dataclasses.replace(one, shape=(768, 1024), bytes=3 * MIB) for one in workload().parameters)
    found = sizes("cuda", work=dataclasses.replace(workload(), parameters=odd), offload_parameters="cpu")
    blocks = sum(one.block is not None for one in odd)
    assert mib(kept_elsewhere(found)["cpu"]) == blocks * (4 + 4) + mib(found.placement.state["cpu"])
