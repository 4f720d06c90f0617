"""Pages of the optimizer's step, their buffers and temporaries, by hand: a root of 8 MiB, four blocks of 16."""

import dataclasses

import pytest
from planner.builders import MIB, mib, parameter, sizes, workload

from lightning_largescale import tiers
from lightning_largescale.planner import paging, placement
from lightning_largescale.planner.paging import moved_in_step, page_buffers, temporaries
from lightning_largescale.planner.peak_memory import memory_of
from lightning_largescale.planner.placement import kept_elsewhere, state_without_pages
from lightning_largescale.techniques.parameter_offload.price import parameters_in_flight

DISK = {"offload_parameters": "nvme", "offload_optimizer": "nvme"}


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
            for module in (tiers, paging, placement):
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
    assert found.state_here == sum(rows.values()) == 18 * MIB
    assert moved_in_step(found) == {"cpu": 126 * MIB}
    every = sizes("cuda", work=none, offload_optimizer="cpu")
    assert every.state_here == sum(needs.state_bytes.values())
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
