"""Activation checkpointing, by hand: bytes and seconds."""

import dataclasses
import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, hardware, parameter, peak_of, step, workload

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import first_excess, peak_memory
from lightning_largescale.planner.runtime import step_time
from lightning_largescale.planner.search import find_plans
from lightning_largescale.planner.sizes import Sizes
from lightning_largescale.techniques.activation_checkpoint.price import fewest_blocks

PLAIN, FULL = Plan(), Plan(activation_checkpointing="full")


def unequal(saved, head):
    """A step whose blocks keep so many MiB each, and whose head needs `head` more while it runs."""
    blocks, live, segments = iter(saved), 0, []
    for segment in step(blocks=len(saved)).segments:
        kept = next(blocks) * MIB if segment.block is not None else 0
        extra = 2 * MIB if segment.block is not None else head * MIB
        segments.append(
            dataclasses.replace(
                segment,
                saved_bytes=kept,
                input_bytes=MIB if kept else 0,
                forward_entry_bytes=live,
                forward_peak_bytes=live + kept + extra,
                forward_exit_bytes=live + kept,
                product_bytes=kept // 3,
                backward_entry_bytes=live + kept,
                backward_peak_bytes=live + kept + extra,
                backward_exit_bytes=live,
            )
        )
        live += kept
    return workload(blocks=len(saved), steps={"32-true": dataclasses.replace(step(), segments=tuple(segments))})


def fits(work, plan, budget):
    return peak_memory(work, plan, hardware(1, kind="cuda")).peak_bytes <= budget


def in_part(names, operations="all"):
    return Plan(activation_checkpointing="selective", checkpointed_blocks=names, checkpointed_operations=operations)


@given(
    saved=st.lists(st.integers(1, 64), min_size=2, max_size=6),
    head=st.integers(0, 32),
    share=st.floats(0.0, 1.0),
    operations=st.sampled_from(["all", "cheap"]),
)
def test_no_smaller_set_of_blocks_fits(saved, head, share, operations):
    work, machine = unequal(saved, head), hardware(1, kind="cuda")
    full = dataclasses.replace(FULL, checkpointed_operations=operations)
    most, least = (peak_memory(work, plan, machine).peak_bytes for plan in (PLAIN, full))
    budget = int(least + share * (most - least))
    if most <= budget:
        return
    sizes = Sizes(work, full, machine.kind)
    names = fewest_blocks(
        work.blocks, sizes.step.segments, sizes.saving, functools.partial(first_excess, sizes, budget)
    )
    sets = [names for size in range(1, len(saved)) for names in itertools.combinations(work.blocks, size)]
    smallest = next((len(names) for names in sets if fits(work, in_part(names, operations), budget)), None)
    if names is None:
        assert smallest is None
    else:
        assert fits(work, in_part(names, operations), budget)
        assert len(names) == smallest


def test_one_block_where_only_the_heap_is_in_the_way():
    # On the CPU a plan that recomputes has its heap watched: most holes of the optimizer's step are gone by that alone.
    work, machine = workload(blocks=4, steps={"32-true": step(blocks=4, saved=2, head=0)}), hardware(1)
    report = find_plans(work, machine)
    most, least = (report.estimate_of(plan).memory for plan in (PLAIN, FULL))
    assert most.moment == "optimizer step"
    report = find_plans(work, machine, memory_budget=(most.peak_bytes + least.peak_bytes) // 2)
    assert report.best.checkpointed_blocks == ("blocks.0",)


def test_copies_of_weights_that_a_sharded_run_does_not_make_are_no_gain():
    work = workload(blocks=2, precisions=("32-true", "bf16-mixed"))
    first, second = ({"saved_bytes": 100 * MIB, "saved_copy_bytes": 80 * MIB}, {"saved_bytes": 60 * MIB})
    mixed = work.steps["bf16-mixed"]
    changes = iter((first, second))
    segments = tuple(
        dataclasses.replace(one, input_bytes=0, **(next(changes) if one.block else {})) for one in mixed.segments
    )
    work = dataclasses.replace(work, steps={**work.steps, "bf16-mixed": dataclasses.replace(mixed, segments=segments)})
    sizes = Sizes(work, Plan(dp_shard=2, precision="bf16-mixed"), "cuda")
    chosen = fewest_blocks(work.blocks, sizes.step.segments, sizes.saving, lambda names: None if names else (3, MIB))
    assert chosen == ("blocks.1",)


def test_between_nothing_and_all():
    work, machine = workload(blocks=8, steps={"32-true": step(blocks=8)}), hardware(1, kind="cuda")
    rows = {row.plan: row for row in find_plans(work, machine).candidates}
    least, most = (rows[plan].estimate.peak_bytes["device"] for plan in (FULL, PLAIN))
    counts = []
    for share in (0.8, 0.5, 0.2):
        report = find_plans(work, machine, memory_budget=int(least + share * (most - least)))
        assert report.best.activation_checkpointing == "selective"
        full = report.estimate_of(FULL)
        assert report.best_estimate.step_seconds < full.step_seconds
        assert report.best_estimate.peak_bytes["device"] <= report.budget_bytes
        report.best.validate(machine, work)
        assert Plan.from_json(report.best.to_json()) == report.best
        counts.append(len(report.best.checkpointed_blocks))
    assert counts == sorted(set(counts))
    assert f"activation checkpointing of {counts[-1]} blocks" in report.best.describe()
    with pytest.raises(
        PlanError, match=r"has 'blocks\.9', which is no repeated block of the model; accepted are its 8"
    ):
        in_part(("blocks.9",)).validate(machine, work)


def test_full_checkpointing_keeps_inputs_and_one_block():
    estimate = peak_of(Plan(activation_checkpointing="full"))
    assert estimate.moment == "forward of blocks.3"
    assert estimate.terms["activations"] == 3 * 8 * MIB + (64 + 16) * MIB
    # Without the gradients of the step before, it is the last block's backward, run again and through.
    frozen = (parameter("a", "blocks.0", trainable=False),)
    work = workload(optimizers=(), parameters=frozen, steps={"32-true": step(head=0)})
    estimate = peak_of(Plan(activation_checkpointing="full"), work=work)
    assert estimate.moment == "backward of blocks.3"
    assert estimate.terms["activations"] == 3 * 8 * MIB + (64 + 32) * MIB


def test_checkpointing_of_what_is_cheap_keeps_results_of_products_too():
    segments = [dataclasses.replace(one, product_bytes=16 * MIB) if one.block else one for one in step().segments]
    work = workload(steps={"32-true": dataclasses.replace(step(), segments=tuple(segments))})
    estimate = peak_of(Plan(activation_checkpointing="full", checkpointed_operations="cheap"), work=work)
    assert estimate.moment == "forward of what follows blocks.3"
    assert estimate.terms["activations"] == 4 * (8 + 16) * MIB + 2 * 32 * MIB


def test_recomputed_blocks_keep_a_copy_of_their_buffers():
    work = workload(buffer_bytes=MIB)
    assert peak_of(work=work).terms["buffers"] == MIB
    assert peak_of(Plan(activation_checkpointing="full"), work=work).terms["buffers"] == 2 * MIB


def test_what_is_cheap_runs_again_without_the_products():
    segments = [
        dataclasses.replace(one, product_bytes=16 * MIB, moved_product_bytes=24 * MIB) if one.block else one
        for one in step().segments
    ]
    work = workload(steps={"32-true": dataclasses.replace(step(), segments=tuple(segments))})
    time = step_time(work, Plan(activation_checkpointing="full", checkpointed_operations="cheap"), hardware(1))
    assert time.terms["recomputation"] == pytest.approx(4 * (64 - 24) * MIB / 10e9)


def test_recomputation_is_the_blocks_forward_again():
    plain, again = (
        step_time(workload(), Plan(activation_checkpointing=mode), hardware(1)) for mode in ("none", "full")
    )
    assert again.step_seconds - plain.step_seconds == pytest.approx(4e9 / 40e9 + 4 * 64 * MIB / 10e9)
