"""Seconds between tiers, by hand: a disk of 1 GB/s, links of 4 GB/s."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, tiered, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.transfers import CHANNELS, HOST_STEP, Away, Passes, transfers

GB = 10**9
NOTHING_BESIDE = Passes(
    forward_seconds=0.0,
    backward_seconds=0.0,
    optimizer_seconds=0.0,
    trained_bytes=4 * GB,
    root_share=0.25,
    micro_batches=1,
    trains=True,
    fetches_again=True,
    releases=False,
)


def seconds(away, kind="cpu", **changes):
    passes = dataclasses.replace(NOTHING_BESIDE, **changes)
    return transfers(away, passes, tiered(kind=kind).rates, kind)


def test_state_is_read_and_written_once_and_shares_the_disk():
    found = seconds(Away(state={"nvme": GB}))
    assert found.terms["nvme read"] == found.terms["nvme write"] == 1.0
    assert found.step_seconds == pytest.approx(2.0)
    # It hides under the arithmetic of the step, of however many micro-batches.
    assert seconds(Away(state={"nvme": GB}), optimizer_seconds=1.5, micro_batches=4).step_seconds == pytest.approx(0.5)
    assert seconds(Away(state={"nvme": GB}), optimizer_seconds=3.0).step_seconds == 0.0


def test_parameters_are_fetched_by_each_pass_and_paged_once():
    away = Away(parameters={"nvme": GB}, trained={"nvme": GB})
    # In forward, in backward, and for the step with their gradients; these go once, and parameters go back.
    assert seconds(away).terms["nvme read"] == pytest.approx(4.0)
    assert seconds(away).terms["nvme write"] == pytest.approx(2.0)
    assert seconds(away, fetches_again=False).terms["nvme read"] == pytest.approx(3.0)
    several = seconds(away, micro_batches=3)
    # Gradients are written by every micro-batch and read by all but the first.
    assert several.terms["nvme read"] == pytest.approx(3 * 2 + 2 + 2)
    assert several.terms["nvme write"] == pytest.approx(3 + 1)
    frozen = seconds(Away(parameters={"nvme": GB}))
    assert frozen.terms["nvme read"] == pytest.approx(2.0)
    assert "nvme write" not in {name for name, value in frozen.terms.items() if value}


def test_an_evaluation_fetches_once():
    found = seconds(Away(parameters={"nvme": GB}), trains=False, fetches_again=False, forward_seconds=0.25)
    assert found.terms["nvme read"] == pytest.approx(1.0)
    assert found.step_seconds == pytest.approx(0.75)


def test_what_is_released_moves_in_backward_and_its_gradients_never():
    away = Away(parameters={"nvme": GB}, trained={"nvme": GB}, state={"nvme": 2 * GB})
    found = seconds(away, releases=True, backward_seconds=2.0)
    assert found.terms["nvme read"] == pytest.approx(1 + 1 + 1 + 2)
    assert found.terms["nvme write"] == pytest.approx(1 + 2)
    # Forward 1 s; backward 2 * 1 + 1 + 2 * 1.5 s of which 2 hide; the root's quarter of the state at the end.
    assert found.step_seconds == pytest.approx(1 + (6 - 2) + 1)


def test_activations_go_in_forward_and_come_in_backward():
    found = seconds(Away(activations={"nvme": GB}), micro_batches=2, forward_seconds=1.5, backward_seconds=4.0)
    assert found.terms["nvme write"] == found.terms["nvme read"] == pytest.approx(2.0)
    assert found.step_seconds == pytest.approx(0.5)


def test_links_have_two_directions_and_a_disk_is_behind_them():
    found = seconds(Away(state={"cpu": GB}), "cuda")
    assert found.terms["host to device"] == found.terms["device to host"] == pytest.approx(0.25)
    assert found.step_seconds == pytest.approx(0.25)
    both = seconds(Away(state={"cpu": GB, "nvme": GB}), "cuda")
    assert both.terms["host to device"] == pytest.approx(0.5)
    assert both.step_seconds == pytest.approx(2.0)


def test_what_the_host_steps_on_is_copied_there_and_its_state_is_not():
    away = Away(state={"cpu": 2 * GB}, by_host={"cpu": 2 * GB}, copied=GB)
    found = seconds(away, "cuda", optimizer_seconds=0.1)
    assert found.terms["host to device"] == pytest.approx(0.25)
    assert found.terms["device to host"] == pytest.approx(0.5)
    # A quarter of the step, in memory that is a fifth as fast.
    assert found.terms[HOST_STEP] == pytest.approx(0.1 / 4 * 4)
    assert found.step_seconds == pytest.approx(0.1 + 0.5 - 0.2)
    released = seconds(away, "cuda", releases=True, backward_seconds=2.0)
    assert released.step_seconds == pytest.approx(0.5 / 4)


def test_what_is_elsewhere_itself_is_stepped_on_there():
    away = Away(parameters={"nvme": GB}, trained={"nvme": GB}, state={"nvme": 2 * GB}, by_host={"nvme": 2 * GB})
    found = seconds(away, "cuda")
    assert found.terms["nvme read"] == pytest.approx(1 + 1 + 4)
    assert found.terms["nvme write"] == pytest.approx(1 + 3)
    assert found.terms["host to device"] == pytest.approx(2 / 4)
    assert found.terms["device to host"] == pytest.approx(1 / 4)
    in_dram = dataclasses.replace(away, parameters={"cpu": GB}, trained={"cpu": GB}, state={"cpu": 1}, by_host={})
    assert seconds(in_dram, "cuda", releases=True).terms["device to host"] == pytest.approx(1 / 4)


def test_who_steps_on_what():
    plan = Plan(offload_optimizer="cpu", offload_parameters="cpu", resident_parameter_bytes=32 * MIB)
    # Two of four blocks of 16 MiB stay, and the root of 8; their state is twice that.
    by_device = Away.of(Sizes(workload(), plan, "cuda"))
    assert by_device.by_host == {"cpu": 64 * MIB}
    assert by_device.copied == 0
    by_host = Away.of(Sizes(workload(), dataclasses.replace(plan, cpu_optimizer_step=True), "cuda"))
    assert by_host.by_host == {"cpu": 144 * MIB}
    assert by_host.copied == 40 * MIB
    assert Away.of(Sizes(workload(), dataclasses.replace(plan, cpu_optimizer_step=True), "cpu")).by_host == {}


def test_dram_of_a_cpu_is_copied():
    found = seconds(Away(state={"cpu": GB}))
    assert found.terms["host copies"] == pytest.approx(2 * 2 * GB / 10e9)


def test_tiers_without_rates():
    rates = dataclasses.replace(tiered().rates, disk_read=None)
    with pytest.raises(ValueError, match="no rate of a disk that can be the nvme tier; calibrate it with one"):
        transfers(Away(state={"nvme": 1}), NOTHING_BESIDE, rates, "cpu")
    with pytest.raises(ValueError, match="no link between host and device; calibrate it on CUDA"):
        transfers(Away(state={"cpu": 1}), NOTHING_BESIDE, tiered().rates, "cuda")
    with pytest.raises(ValueError, match="no bandwidth of the host's memory; calibrate it on CUDA"):
        transfers(Away(trained={"cpu": 1}), NOTHING_BESIDE, tiered().rates, "cuda")


def test_a_step_has_its_transfers_as_terms():
    plain = step_time(workload(), Plan(), tiered())
    state = step_time(workload(), Plan(offload_optimizer="nvme"), tiered())
    assert state.terms["nvme read"] == pytest.approx(144 * MIB / 1e9)
    assert state.step_seconds == pytest.approx(
        plain.step_seconds + max(0.0, 2 * 144 * MIB / 1e9 - plain.terms["optimizer step"])
    )
    more = step_time(workload(), Plan(offload_parameters="nvme"), tiered(), accumulate_grad_batches=2)
    assert more.terms["nvme write"] == pytest.approx(3 * 64 * MIB / 1e9)


sizes = st.integers(0, 10**10)
tiers = st.dictionaries(st.sampled_from(["cpu", "nvme"]), sizes)


@given(parameters=tiers, state=tiers, saved=tiers, micro=st.integers(1, 4), kind=st.sampled_from(["cpu", "cuda"]))
def test_no_term_is_negative_and_nothing_hides_more_than_there_is(parameters, state, saved, micro, kind):
    away = Away(parameters=parameters, trained=parameters, state=state, activations=saved)
    found = seconds(away, kind, micro_batches=micro, forward_seconds=0.5, backward_seconds=1.0, optimizer_seconds=0.1)
    assert {*found.terms} <= {*CHANNELS, HOST_STEP}
    assert all(value >= 0 for value in found.terms.values())
    assert -1e-9 <= found.step_seconds <= sum(found.terms.values()) + 1e-9
    more = dataclasses.replace(away, state={tier: size + GB for tier, size in state.items()})
    less, longer = (seconds(one, kind, micro_batches=micro).step_seconds for one in (away, more))
    assert longer >= less - 1e-9
