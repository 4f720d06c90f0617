"""What leaves the device goes to DRAM as far as it goes, in the order of how often it moves; the rest to a disk."""

import pytest
from planner.builders import MIB, step, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.remedy import UNLIMITED, Choice
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.spread import spread
from lightning_largescale.planner.transfers import Away

ALL = frozenset({"optimizer", "activations", "parameters"})
GIB = 2**30


def found(techniques=ALL, kind="cuda", blocks=4, tiers=None, work=None, **amounts):
    given = {"cpu": UNLIMITED} if tiers is None else tiers
    stays = {"offload_parameters": "cpu", "resident_parameter_bytes": UNLIMITED} if "parameters" in techniques else {}
    sizes = Sizes(work or workload(), Plan(**stays), kind)
    result = spread(sizes, frozenset(techniques), Choice(blocks=blocks, **amounts), given)
    if result is not None:
        # What it says of bytes is what the plan's own sizes say.
        placed = sizes.placing(result.plan)
        told, kept = result.away.stepped_on(sizes, by_host=False), Away.of(placed)
        assert told.copied == kept.copied
        for name in ("parameters", "trained", "state", "activations", "by_host"):
            assert {k: v for k, v in getattr(told, name).items() if v} == {
                k: v for k, v in getattr(kept, name).items() if v
            }, name
    return result


def test_all_in_dram_where_it_has_the_room():
    plan = found().plan
    assert (plan.offload_parameters, plan.offload_optimizer, plan.offload_activations) == ("cpu", "cpu", "cpu")
    assert plan.resident_parameter_bytes is plan.cpu_parameter_bytes is plan.offloaded_blocks is None


def test_amounts_become_fields():
    plan = found(groups=1, blocks=2, state_bytes=32 * MIB).plan
    assert plan.resident_parameter_bytes == 16 * MIB
    assert plan.resident_optimizer_bytes == 32 * MIB
    assert plan.offloaded_blocks == ("blocks.0", "blocks.1")
    # On CUDA what is elsewhere is stepped on there: state of the root and one block may stay, 24 of 72 MiB twice.
    assert found(groups=1, blocks=2, state_bytes=64 * MIB).plan.resident_optimizer_bytes == 48 * MIB
    on_cpu = found(kind="cpu", groups=1, blocks=2, state_bytes=64 * MIB, tiers={"nvme": GIB}).plan
    assert on_cpu.resident_optimizer_bytes == 64 * MIB
    assert found({"release"}, blocks=0).plan == Plan(release_gradients=True)


def test_parameters_go_to_dram_before_activations_and_these_before_state():
    work = workload(blocks=16, steps={"32-true": step(blocks=16, saved=8 * MIB)})
    # Through DRAM pass 192 MiB of pages, two shards of 16 and their gradients, what two blocks of 8 saved, requests.
    through = 192 + 2 * 16 + 2 * 16 + 2 * 8 + 32
    # Sixteen groups with their gradients, 128 MiB saved, 528 MiB of state.
    plan = found(work=work, blocks=16, tiers={"cpu": (through + 512 + 128 + 40) * MIB, "nvme": GIB}).plan
    assert (plan.offload_parameters, plan.offload_activations, plan.offload_optimizer) == ("cpu", "cpu", "nvme")
    assert plan.cpu_optimizer_bytes == 32 * MIB
    plan = found(work=work, blocks=16, tiers={"cpu": (through + 70) * MIB, "nvme": 2 * GIB}).plan
    assert (plan.offload_parameters, plan.offload_activations, plan.offload_optimizer) == ("nvme", "nvme", "nvme")
    assert plan.cpu_parameter_bytes == 32 * MIB
    assert plan.cpu_optimizer_bytes is None


@pytest.mark.parametrize(
    ("tiers", "fits"),
    [
        ({"nvme": (144 + 128 + 256) * MIB}, True),
        ({"nvme": (144 + 128 + 256) * MIB - 1}, False),
        ({"cpu": (144 + 128 + 256) * MIB}, True),
        ({"cpu": (144 + 128 + 256) * MIB - 1}, False),
        ({}, False),
    ],
)
def test_room(tiers, fits):
    assert (found(tiers=tiers) is not None) == fits


def test_on_the_cpu_all_goes_to_the_disk():
    result = found(kind="cpu", tiers={"nvme": GIB})
    assert result.plan.offload_parameters == result.plan.offload_optimizer == "nvme"
    placed = Sizes(workload(), result.plan, "cpu").placement
    assert placed.away == {*workload().blocks}
