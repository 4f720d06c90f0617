"""Offloaded parameters, by hand: a root of 8 MiB, four blocks of 16."""

from planner.builders import MIB, hardware, mib, parameter, sizes, terms_at, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.techniques.parameter_offload.price import parameters_in_flight

DISK = {"offload_parameters": "nvme", "offload_optimizer": "nvme"}


def test_shards_of_the_next_groups_are_on_their_way():
    found = sizes(offload_parameters="nvme")
    assert [*map(mib, parameters_in_flight(found, backward=False))] == [32, 32, 32, 16, 0]
    assert [*map(mib, parameters_in_flight(found, backward=True))] == [16, 32, 32, 32, 32]
    found = sizes(offload_parameters="nvme", resident_parameter_bytes=16 * MIB, prefetched_blocks=2)
    assert [*map(mib, parameters_in_flight(found, backward=False))] == [48, 32, 16, 0, 0]
    assert parameters_in_flight(sizes(), backward=True) == [0] * 5


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
    setup = ("setup", None)
    assert terms_at(setup, found)["parameters"] == 72
    unmade = terms_at(setup, found, built=False)
    assert (unmade["parameters"], unmade["gathered parameters"]) == (8, 16)
    assert terms_at(setup, sizes(), built=False)["parameters"] == 72
    small = workload(parameters=(*workload().parameters[1:], parameter("embedding", None, rows=8)), optimizers=())
    least = peak_memory(small, Plan(offload_parameters="nvme"), hardware(1), built=False)
    assert least.moment != "setup"
