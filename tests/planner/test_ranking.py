"""The order of plans that were priced, and the words for each place."""

import pytest
from planner.builders import MIB

from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import MemoryEstimate
from lightning_largescale.planner.ranking import ranked
from lightning_largescale.planner.report import Estimate
from lightning_largescale.planner.runtime import TimeEstimate


def estimate(mib, seconds, **elsewhere):
    memory = MemoryEstimate(moment="setup", terms={"parameters": mib * MIB})
    time = TimeEstimate(terms={"forward": seconds})
    peak_bytes = {"device": mib * MIB, **{tier: size * MIB for tier, size in elsewhere.items()}}
    return Estimate(
        peak_bytes=peak_bytes, step_seconds=seconds, samples_per_second=1 / seconds, memory=memory, time=time
    )


PLAIN, AGAIN, DISK = Plan(), Plan(activation_checkpointing="full"), Plan(offload_optimizer="nvme")


def order(*rows):
    budgets = {"device": 10 * MIB, "nvme": 5 * MIB}
    return [(row.plan, row.status, row.reason) for row in ranked(rows, budgets, {"32-true"}, fixed=False)]


def test_a_plan_fits_where_every_tier_has_the_room():
    found = order((PLAIN, estimate(11, 1.0)), (AGAIN, estimate(10, 3.0)), (DISK, estimate(9, 2.0, nvme=5)))
    assert [row[:2] for row in found] == [(DISK, "chosen"), (AGAIN, "fits"), (PLAIN, "too large")]
    assert found[1][2] == "1.50 times the step time, 1.00 s more of forward"


@pytest.mark.parametrize(
    ("peaks", "reason"),
    [
        ((12, 5), "lacks 2.00 MiB at the setup, where parameters take 12.0 MiB"),
        ((9, 7), "lacks 2.00 MiB on nvme"),
        ((12, 7), "lacks 2.00 MiB at the setup, where parameters take 12.0 MiB, and lacks 2.00 MiB on nvme"),
    ],
)
def test_what_a_plan_lacks(peaks, reason):
    ((_, status, found),) = order((DISK, estimate(peaks[0], 1.0, nvme=peaks[1])))
    assert (status, found) == ("too large", reason)


def test_the_nearest_lacks_the_least_in_all_tiers():
    found = order((PLAIN, estimate(14, 1.0)), (DISK, estimate(11, 1.0, nvme=7)), (AGAIN, estimate(12, 1.0)))
    assert [plan for plan, *_ in found] == [AGAIN, DISK, PLAIN]


def test_what_is_not_allowed_comes_last():
    bf16 = Plan(precision="bf16-mixed")
    found = order((bf16, estimate(1, 0.1)), (PLAIN, estimate(11, 1.0)))
    assert found[1] == (bf16, "not allowed", "bf16-mixed changes numerics and allow does not name it")
