"""No step that techniques make fit is faster than its bound."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from planner.builders import MIB, step, tiered, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.amounts import Amounts
from lightning_largescale.planner.bounds import least_seconds
from lightning_largescale.planner.offload_search import OFFLOADS, Offloading
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.tier_budgets import tier_budgets


def bound(work, machine, plan, techniques, budget, built=False, again=0.0):
    memory, seconds = peak_memory(work, plan, machine, built=built), step_time(work, plan, machine).step_seconds
    return least_seconds(
        work,
        plan,
        memory,
        seconds,
        techniques,
        hardware=machine,
        budget_bytes=budget,
        built=built,
        again_byte_seconds=again,
    )


def test_by_hand():
    # Of a plan whose heap is watched as it is.
    work, machine, plan = workload(), tiered(), Plan(activation_checkpointing="full")
    memory, seconds = peak_memory(work, plan, machine), step_time(work, plan, machine).step_seconds
    optimizer = frozenset({"optimizer"})
    # A byte of state that leaves takes one read and one write at 1 GB/s.
    lacking = 100 * MIB
    assert bound(work, machine, plan, optimizer, memory.peak_bytes - lacking) == max(seconds, 2 * lacking / 1e9)
    # There are 144 MiB of it.
    assert bound(work, machine, plan, optimizer, memory.peak_bytes - 145 * MIB) is None
    # Gradients are there at the worst moment, and cost nothing to drop.
    assert bound(work, machine, plan, frozenset({"release"}), memory.peak_bytes - 50 * MIB) == seconds


def test_nothing_helps_a_model_that_is_too_large_when_it_is_built():
    frozen = tuple(dataclasses.replace(one, trainable=False) for one in workload().parameters)
    small = workload(steps={"32-true": step(saved=8, head=8)}, optimizers=(), parameters=frozen)
    plan = Plan(dp_shard=8)
    every = frozenset(OFFLOADS)
    assert peak_memory(small, plan, tiered(8)).moment == "setup"
    assert bound(small, tiered(8), plan, every, 64 * MIB, built=True) is None


@settings(max_examples=60)
@given(
    names=st.sets(st.sampled_from(OFFLOADS)),
    again=st.booleans(),
    share=st.floats(0.1, 1.0),
    saved=st.sampled_from([1, 16, 64]),
    kind=st.sampled_from(["cpu", "cuda"]),
    plan=st.sampled_from([Plan(), Plan(activation_checkpointing="full")]),
    host=st.sampled_from([1e9, 1e12]),
)
def test_no_plan_is_faster_than_its_bound(names, again, share, saved, kind, plan, host):
    again = again and plan == Plan()
    techniques = frozenset(names - {"activations"} | {"recomputation"} if again else names or {"optimizer"})
    work = workload(blocks=8, steps={"32-true": step(blocks=8, saved=saved * MIB, head=4 * MIB)})
    machine = tiered(kind=kind)
    if kind == "cuda":
        machine = dataclasses.replace(
            machine, rates=dataclasses.replace(machine.rates, memory_bandwidth=1e12, host_memory_bandwidth=host)
        )
    budget = int(share * peak_memory(work, plan, machine, built=False).peak_bytes) - 1
    search = Offloading(
        workload=work,
        hardware=machine,
        budgets={"device": budget, **tier_budgets(machine)},
        accumulate=1,
        may_release=True,
        setup={"built": False},
    )
    (least_again, *_) = [seconds for _, seconds in search.with_recomputation(plan)] or [0.0]
    least = bound(work, machine, plan, techniques, budget, again=least_again)
    for layout in search.layouts(plan, gathering="parameters" in techniques):
        found = Amounts(layout, techniques).best()
        if found is not None:
            assert least is not None
            assert found[1] >= least * (1 - 1e-9)
