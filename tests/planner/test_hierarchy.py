"""What stays, what is on its way and what is kept elsewhere, by hand: a root of 8 MiB, four blocks of 16."""

import dataclasses

import pytest
from planner.builders import MIB, hardware, parameter, workload

from lightning_largescale import tiers
from lightning_largescale.plan import Plan
from lightning_largescale.planner import hierarchy, placement
from lightning_largescale.planner.hierarchy import (
    activations_in_flight,
    gradients_passing,
    kept_elsewhere,
    moved_in_step,
    page_buffers,
    parameters_here,
    parameters_in_flight,
    staging_bytes,
    state_here,
    temporaries,
)
from lightning_largescale.planner.peak_memory import _moments, memory_of, peak_memory, setup_terms
from lightning_largescale.planner.placement import state_without_pages
from lightning_largescale.planner.sizes import Sizes

DISK = {"offload_parameters": "nvme", "offload_optimizer": "nvme"}


def sizes(kind="cpu", accumulate=1, work=None, **fields):
    return Sizes(work or workload(), Plan(**fields), kind, accumulate)


def mib(count):
    return count // MIB if count % MIB == 0 else count / MIB


def test_the_root_stays_and_so_do_the_last_groups_that_may():
    assert mib(parameters_here(sizes(offload_parameters="nvme"))) == 8
    assert mib(parameters_here(sizes(offload_parameters="nvme", resident_parameter_bytes=40 * MIB))) == 8 + 2 * 16
    assert mib(parameters_here(sizes(offload_parameters="nvme", dp_shard=2))) == 4
    # On the CPU DRAM is the device's own memory.
    assert mib(parameters_here(sizes(offload_parameters="cpu"))) == 8 + 64
    assert mib(parameters_here(sizes("cuda", offload_parameters="cpu"))) == 8


def test_shards_of_the_next_groups_are_on_their_way():
    found = sizes(offload_parameters="nvme")
    assert [*map(mib, parameters_in_flight(found, backward=False))] == [32, 32, 32, 16, 0]
    assert [*map(mib, parameters_in_flight(found, backward=True))] == [16, 32, 32, 32, 32]
    found = sizes(offload_parameters="nvme", resident_parameter_bytes=16 * MIB, prefetched_blocks=2)
    assert [*map(mib, parameters_in_flight(found, backward=False))] == [48, 32, 16, 0, 0]
    assert parameters_in_flight(sizes(), backward=True) == [0] * 5


def test_state_stays_in_whole_pages():
    assert state_here(sizes(offload_optimizer="nvme")) == 0
    assert mib(state_here(sizes(offload_optimizer="nvme", resident_optimizer_bytes=70 * MIB))) == 64
    assert mib(state_here(sizes(offload_optimizer="nvme", resident_optimizer_bytes=2**40))) == 144
    assert mib(state_here(sizes(offload_optimizer="cpu"))) == 144
    assert state_here(sizes("cuda", offload_optimizer="cpu")) == 0
    assert state_here(sizes(work=workload(stage="validate"))) == 0


def test_what_the_step_moves_and_through_which_buffers():
    assert moved_in_step(sizes(**DISK)) == {"nvme": (144 + 2 * 64) * MIB}
    assert moved_in_step(sizes(**DISK, release_gradients=True)) == {"nvme": (144 + 64) * MIB}
    split = sizes("cuda", **DISK, cpu_optimizer_bytes=100 * MIB, cpu_parameter_bytes=20 * MIB)
    assert moved_in_step(split) == {"cpu": (96 + 2 * 16) * MIB, "nvme": (48 + 2 * 48) * MIB}
    assert mib(page_buffers(sizes(offload_optimizer="nvme"))) == 144
    assert mib(page_buffers(sizes(**DISK))) == 6 * 32
    assert page_buffers(sizes()) == page_buffers(sizes(work=workload(stage="predict"), offload_parameters="nvme")) == 0


def test_beside_a_cuda_device_pages_and_shards_wait_in_dram():
    found = sizes("cuda", **DISK)
    assert page_buffers(found) == 0
    assert parameters_in_flight(found, backward=False) == [0] * 5
    # Buffers of pages, and shards and gradients of two groups.
    assert mib(kept_elsewhere(found)["cpu"]) == 6 * 32 + 2 * 16 + 2 * 16
    assert "page buffers" not in memory_of(found).terms


def test_a_cuda_device_is_brought_the_state_of_a_page_and_steps_on_what_is_there():
    every = [None, *workload().blocks]
    needs = dataclasses.replace(workload().optimizers[0], step_temporary_largest=0.0)
    work = workload(optimizers=(needs,))
    assert temporaries(sizes("cuda", work=work), every) == 0
    assert mib(temporaries(sizes("cuda", work=work, offload_optimizer="cpu"), every)) == 32
    assert mib(temporaries(sizes("cuda", work=work, offload_optimizer="cpu"), [None])) == 2 * 8
    # The host steps on the blocks.
    assert mib(temporaries(sizes("cuda", work=work, offload_parameters="cpu", offload_optimizer="cpu"), every)) == 16
    assert temporaries(sizes("cuda", work=work, offload_parameters="cpu"), ["blocks.1"]) == 0
    assert temporaries(sizes(work=work, offload_optimizer="nvme"), every) == 0


def test_a_page_has_all_of_a_parameter_that_is_stepped_on_as_a_whole():
    every = [None, *workload().blocks]
    (needs,) = workload().optimizers
    work = workload(optimizers=(dataclasses.replace(needs, divisible=False),))
    for page_bytes, brought, buffers in [(32, 32, 144), (4, 16, 6 * 16)]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (tiers, hierarchy, placement):
                patch.setattr(module, "PAGE_BYTES", page_bytes * MIB)
            assert mib(temporaries(sizes("cuda", work=work, offload_optimizer="cpu"), every)) == 2 * 8 + brought
            assert mib(page_buffers(sizes(work=work, offload_optimizer="nvme"))) == buffers


def test_state_of_other_shapes_stays_and_what_has_no_other_is_stepped_on_at_once():
    (needs,) = workload().optimizers
    rows = {name: size // 8 for name, size in needs.state_bytes.items()}
    some, none = (
        workload(optimizers=(dataclasses.replace(needs, unpaged_bytes=unpaged),))
        for unpaged in (rows, needs.state_bytes)
    )
    found = sizes("cuda", work=some, offload_optimizer="cpu")
    assert state_here(found) == sum(rows.values()) == 18 * MIB
    assert moved_in_step(found) == {"cpu": 126 * MIB}
    every = sizes("cuda", work=none, offload_optimizer="cpu")
    assert state_here(every) == sum(needs.state_bytes.values())
    assert moved_in_step(every) == {}
    assert temporaries(every, [None, *none.blocks]) == temporaries(sizes("cuda", work=none), [None, *none.blocks])


def test_state_of_other_shapes_is_not_more_than_there_is():
    parameters = [parameter(f"blocks.{index}.up", f"blocks.{index}", rows=7, columns=1) for index in range(4)]
    # Bytes that three ranks do not share evenly.
    (needs,) = workload().optimizers
    state = {one.name: 9 for one in parameters}
    needs = dataclasses.replace(needs, state_bytes=state, unpaged_bytes=state)
    work = workload(parameters=tuple(parameters), optimizers=(needs,))
    found = sizes("cuda", work=work, dp_shard=3, offload_optimizer="cpu")
    assert sum(found.paging.unpaged.values()) > found.optimizer_state
    assert state_without_pages(found, ()) == found.optimizer_state
    assert moved_in_step(found) == {}


def test_temporaries_are_those_of_a_page_or_of_a_released_group():
    needs = dataclasses.replace(workload().optimizers[0], step_temporary_largest=0.0, step_temporary_total=1.0)
    work = workload(optimizers=(needs,))
    every = [None, *workload().blocks]
    assert mib(temporaries(sizes(work=work), every)) == 72
    assert mib(temporaries(sizes(work=work, release_gradients=True), ["blocks.1"])) == 16
    # A page of two states is for half as many bytes of parameters.
    assert mib(temporaries(sizes(work=work, offload_optimizer="nvme"), every)) == 16
    # Half a page of parameters with their gradients; the root is stepped on as ever.
    assert mib(temporaries(sizes(work=work, offload_parameters="nvme"), every)) == 16
    assert mib(temporaries(sizes(work=work, offload_parameters="nvme"), [None])) == 8


def test_saved_bytes_of_two_blocks_are_on_their_way_out_and_of_one_back():
    found = sizes(offload_activations="nvme")
    assert [*map(mib, activations_in_flight(found, backward=False))] == [0, 64, 128, 128, 128]
    assert [*map(mib, activations_in_flight(found, backward=True))] == [0, 64, 64, 64, 64]
    assert [*map(mib, found.dropped)] == [0, 64, 128, 192, 256]
    ahead = sizes(offload_activations="nvme", prefetched_blocks=2)
    assert [*map(mib, activations_in_flight(ahead, backward=True))] == [0, 64, 128, 128, 128]
    again = sizes(offload_activations="nvme", activation_checkpointing="full", offloaded_blocks=("blocks.0",))
    assert [*map(mib, activations_in_flight(again, backward=False))] == [0, 8, 8, 0, 0]
    assert [*map(mib, again.dropped)] == [0, 64, 64 + 56, 64 + 2 * 56, 64 + 3 * 56]
    # What is already in DRAM gains nothing by going there.
    assert sizes(offload_activations="cpu").dropped == [0] * 5


def test_on_cuda_what_has_left_makes_room_before_a_block_is_at_its_worst():
    found = sizes("cuda", offload_activations="cpu")
    # A block's own rise is more than what the last but one saved; what follows the last block has both.
    assert [*map(mib, activations_in_flight(found, backward=False))] == [0, 64, 64, 64, 128]
    assert [*map(mib, activations_in_flight(found, backward=True))] == [0, 64, 64, 64, 64]


def test_gradients_pass_where_they_are_released_or_leave():
    assert mib(gradients_passing(sizes(release_gradients=True), ["blocks.0", "blocks.1", None])) == 32
    assert gradients_passing(sizes(), ["blocks.0"]) == 0
    partly = sizes(offload_parameters="nvme", resident_parameter_bytes=16 * MIB)
    assert mib(gradients_passing(partly, ["blocks.2", "blocks.3"])) == 16


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
    assert mib(staging_bytes(found)) == 6 * 32 + 2 * 16 + 2 * 16 + 2 * 64 + 8 * 4
    assert kept_elsewhere(found)["cpu"] == staging_bytes(found)
    # One more of each that is fetched ahead; of four blocks the last one's activations stay.
    ahead = sizes("cuda", **DISK, offload_activations="nvme", prefetched_blocks=2)
    assert mib(staging_bytes(ahead) - staging_bytes(found)) == 16 + 64
    assert mib(kept_elsewhere(ahead)["nvme"]) == 144 + 2 * 64 + 3 * 64


def test_state_that_stays_in_dram_goes_through_no_buffer_of_a_page():
    # Two of four bytes of a page are then parameters and gradients.
    assert mib(staging_bytes(sizes("cuda", offload_optimizer="cpu", host_optimizer_step=True))) == 6 * 16
    assert mib(staging_bytes(sizes("cuda", offload_optimizer="nvme", host_optimizer_step=True))) == 6 * 32
    shards = sizes("cuda", offload_parameters="nvme", release_gradients=True)
    # A third, all 64 MiB of it, and shards and gradients of two groups.
    assert mib(staging_bytes(shards)) == pytest.approx(64 + 2 * 16 + 2 * 16, abs=1)


def test_torch_pins_each_tensor_in_a_power_of_two():
    odd = tuple(dataclasses.replace(one, shape=(768, 1024), bytes=3 * MIB) for one in workload().parameters)
    found = sizes("cuda", work=dataclasses.replace(workload(), parameters=odd), offload_parameters="cpu")
    blocks = sum(one.block is not None for one in odd)
    assert mib(kept_elsewhere(found)["cpu"]) == blocks * (4 + 4) + mib(found.placement.state["cpu"])


def terms_at(what, found):
    """Terms of the worst of the moments that begin like `what`."""
    moments = [row for row in _moments(found, 0, True) if row[0] == what[0] and row[1] == what[1]]
    return {name: mib(size) for name, size in moments[0][2].items()}


def test_a_release_keeps_the_gradients_of_two_groups_and_of_the_root():
    found = sizes(release_gradients=True)
    assert terms_at(("backward", 1), found)["gradients"] == 8 + 2 * 16
    assert terms_at(("backward", 3), found)["gradients"] == 8 + 16
    assert terms_at(("forward", 0), found)["gradients"] == 8
    assert terms_at(("optimizer step", None), found)["optimizer temporaries"] == 16
    # Shards: the whole gradients of one group, and the shard of the one before.
    found = sizes(release_gradients=True, dp_shard=2)
    assert terms_at(("backward", 1), found)["gradients"] == 8
    assert terms_at(("backward", 1), found)["unreduced gradients"] == 8 + 16


def test_gradients_that_leave_do_so_in_every_micro_batch():
    found = sizes(accumulate=2, **DISK)
    assert terms_at(("forward", 0), found)["gradients"] == 8
    backward = terms_at(("backward", 1), found)
    assert backward["gradients"] == 8 + 16
    assert backward["unreduced gradients"] == 8 + 16
    whole = sizes(accumulate=2, dp_shard=2)
    assert terms_at(("forward", 0), whole)["gradients"] == 72
    assert found.reductions == 2
    assert whole.reductions == 1


def test_one_rank_gathers_what_it_fetches_as_several_do():
    found = terms_at(("backward", 1), sizes(offload_parameters="nvme"))
    # The root twice, at rest and gathered; the group that computes, and the next.
    assert found["parameters"] == 8
    assert found["gathered parameters"] == 8 + 2 * 16
    assert found["parameters in flight"] == 32


def test_a_model_without_values_is_made_group_by_group():
    found = sizes(offload_parameters="nvme")
    assert setup_terms(found)["parameters"] == 72 * MIB
    assert setup_terms(found, built=False) == {"parameters": 8 * MIB, "gathered parameters": 16 * MIB}
    assert setup_terms(sizes(), built=False)["parameters"] == 72 * MIB
    small = workload(parameters=(*workload().parameters[1:], parameter("embedding", None, rows=8)), optimizers=())
    least = peak_memory(small, Plan(offload_parameters="nvme"), hardware(1), built=False)
    assert least.moment != "setup"


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
