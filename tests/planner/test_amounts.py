"""The amounts that cost the least: sums of moments are the moments, and nothing that is tried is better."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner.builders import MIB, step, tiered, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.amounts import Amounts, Layout
from lightning_largescale.planner.peak_memory import allocator_share, moments_bytes, peak_memory
from lightning_largescale.planner.remedy import UNLIMITED, Choice
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.planner.spread import in_unit
from lightning_largescale.planner.tier_budgets import shortfalls, tier_budgets
from lightning_largescale.tiers import PAGE_BYTES

TECHNIQUES = ("release", "optimizer", "activations", "parameters")
# Blocks' activations leave, or the blocks recompute: not both.
sets = st.one_of(
    st.sets(st.sampled_from(TECHNIQUES), min_size=1),
    st.sets(st.sampled_from(("release", "optimizer", "parameters"))).map(lambda names: names | {"recomputation"}),
).map(frozenset)


def layout(work, machine, budget, techniques, plan=None):
    tier = "nvme" if machine.kind == "cpu" else "cpu"
    stays = {"offload_parameters": tier, "resident_parameter_bytes": UNLIMITED} if "parameters" in techniques else {}
    sizes = Sizes(work, plan or Plan(**stays), machine.kind)
    return Layout(sizes, machine, {"device": budget, **tier_budgets(machine)}, built=False)


@given(techniques=sets, groups=st.integers(0, 3), blocks=st.integers(1, 4), kind=st.sampled_from(["cpu", "cuda"]))
def test_moments_of_a_choice_are_sums(techniques, groups, blocks, kind):
    here = layout(workload(), tiered(kind=kind), 2**40, techniques)
    choice = Choice(groups=groups, blocks=blocks)
    direct = moments_bytes(here.without(techniques, choice), built=False)
    assert here.moments(techniques, choice) == direct
    plan = here.without(techniques, choice).plan
    peak = peak_memory(workload(), plan, tiered(kind=kind), built=False).peak_bytes
    assert peak == max(total + int(allocator_share(plan, kind) * moving) for total, moving in direct)


def choices(work, techniques):
    """Every choice of amounts there is."""
    state = sum(work.optimizers[0].state_bytes.values())
    groups = range(len(work.blocks)) if "parameters" in techniques else [0]
    blocks = range(1, len(work.blocks) + ("activations" in techniques)) if in_unit(techniques, "blocks") else [0]
    pages = range(0, state, PAGE_BYTES) if "optimizer" in techniques else [0]
    for group, block, page in itertools.product(groups, blocks, pages):
        yield Choice(groups=group, blocks=block, state_bytes=page)


@settings(max_examples=25)
@given(
    techniques=sets,
    budget=st.integers(250, 700),
    saved=st.sampled_from([1, 40]),
    kind=st.sampled_from(["cpu", "cuda"]),
    dram=st.sampled_from([300, 4096]),
)
def test_no_choice_that_fits_is_faster(techniques, budget, saved, kind, dram):
    work = workload(steps={"32-true": step(saved=saved * MIB, head=4 * MIB)})
    machine = tiered(kind=kind, dram=dram * MIB)
    budget = (budget + (64 if kind == "cuda" else 0)) * MIB
    amounts = Amounts(layout(work, machine, budget, techniques), techniques)
    best, fastest = amounts.best(), None
    for choice in choices(work, techniques):
        plan = amounts.plan(choice)
        if plan is None:
            continue
        memory = peak_memory(work, plan, machine, built=False)
        if shortfalls({"device": memory.peak_bytes, **memory.elsewhere}, amounts.layout.budgets):
            continue
        seconds = step_time(work, plan, machine).step_seconds
        fastest = seconds if fastest is None else min(fastest, seconds)
    if fastest is None or best is None:
        assert best is None
        assert fastest is None
        return
    plan, seconds = best
    assert seconds == pytest.approx(step_time(work, plan, machine).step_seconds)
    assert seconds == pytest.approx(fastest)


def test_nothing_where_all_that_may_leave_is_too_little():
    assert Amounts(layout(workload(), tiered(), MIB, {"optimizer"}), frozenset({"optimizer"})).best() is None
