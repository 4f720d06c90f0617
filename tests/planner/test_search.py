import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, hardware, segment, step, workload

from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.hardware.catalogue import CONTEXT_BYTES
from lightning_largescale.plan import Plan
from lightning_largescale.planner import search
from lightning_largescale.planner.peak_memory import peak_memory
from lightning_largescale.planner.search import candidates, find_plans

BOTH = ("32-true", "bf16-mixed")
LINKS = ("all_gather", "reduce_scatter", "all_reduce")


def test_candidates_of_four_devices():
    plans = set(candidates(workload(), hardware(4)))
    assert len(plans) == 2 * (1 + 2 + 2)
    assert {plan.world_size for plan in plans} == {4}
    assert Plan(dp_replicate=2, dp_shard=2, reshard_after_forward=False, activation_checkpointing="full") in plans


def test_one_device_with_room_takes_the_plain_plan():
    report = find_plans(workload(), hardware(1))
    assert report.best == Plan()
    assert report.candidates[0].reason == "the fastest of those that fit"
    assert "times the step time" in report.candidates[1].reason
    assert "more of recomputation" in report.candidates[1].reason


@given(world=st.sampled_from([1, 2, 4, 8]), budget=st.integers(100 * MIB, 2000 * MIB))
def test_the_best_is_the_fastest_that_fits_and_a_larger_budget_is_never_slower(world, budget):
    report = find_plans(workload(), hardware(world), memory_budget=budget)
    in_part = [row for row in report.candidates if row.plan.activation_checkpointing == "selective"]
    assert len(report.candidates) == len(list(candidates(workload(), hardware(world)))) + len(in_part)
    assert all(row.estimate.peak_bytes["device"] <= budget for row in in_part)
    assert all(row.reason for row in report.candidates)
    fitting = [row for row in report.candidates if row.estimate.peak_bytes["device"] <= budget]
    assert report.fits == bool(fitting)
    if report.fits:
        assert report.best_estimate.step_seconds == min(row.estimate.step_seconds for row in fitting)
        assert report.best_estimate.peak_bytes["device"] <= budget
        more = find_plans(workload(), hardware(world), memory_budget=budget + 50 * MIB)
        assert more.best_estimate.step_seconds <= report.best_estimate.step_seconds


def test_the_choice_follows_the_budget():
    least = min(row.estimate.peak_bytes["device"] for row in find_plans(workload(), hardware(2)).candidates)
    seen = []
    for budget in range(1500 * MIB, least, -MIB):
        best = find_plans(workload(), hardware(2), memory_budget=budget).best
        if best not in seen:
            seen.append(best)
    assert seen[0].activation_checkpointing == "none"
    assert seen[-1] == Plan(dp_shard=2, activation_checkpointing="full")
    assert len(seen) >= 3
    with pytest.raises(
        PlanError, match=r"no plan fits .* a rank; the nearest \(.*\) lacks .* on device: .*give a budget of"
    ):
        _ = find_plans(workload(), hardware(2), memory_budget=least - 1).best


def test_lossy_only_where_allowed():
    fast = hardware(1, bf16=400e9)
    report = find_plans(workload(precisions=BOTH), fast)
    assert report.best.precision == "32-true"
    refused = [row for row in report.candidates if row.status == "not allowed"]
    assert refused
    assert refused[0].reason == "bf16-mixed changes numerics and allow does not name it"
    assert any("allow=('bf16-mixed',) would be" in line for line in report.advice)
    assert find_plans(workload(precisions=BOTH), fast, allow=("bf16-mixed",)).best.precision == "bf16-mixed"
    assert find_plans(workload(precisions=BOTH), hardware(1), allow=("bf16-mixed",)).best.precision == "32-true"
    assert find_plans(workload(precisions=BOTH), hardware(1), precision="bf16-mixed").best.precision == "bf16-mixed"


def test_advice_takes_little_more_than_the_search(monkeypatch):
    priced = []
    monkeypatch.setattr(search, "peak_memory", lambda *args, **kw: priced.append(1) or peak_memory(*args, **kw))
    work = workload(precisions=BOTH, batch_samples=1024)
    assert not find_plans(work, hardware(8), memory_budget=MIB).fits
    assert len(priced) < 4 * len(list(candidates(work, hardware(8))))


def test_without_a_budget_the_free_memory_counts():
    free = hardware(1, free=1000 * MIB)
    assert find_plans(workload(), free).budget_bytes == 900 * MIB
    assert find_plans(workload(), free, baseline_bytes=7).budget_bytes == 900 * MIB + 7
    published = Hardware.named("1xH100-80GB")
    assert find_plans(workload(), published).budget_bytes == int(0.9 * (80 * 10**9 - CONTEXT_BYTES))


def test_a_precision_that_the_hardware_cannot_compute():
    rates = dataclasses.replace(hardware(1).rates, matmul={"float32": 40e9})
    old = dataclasses.replace(hardware(1), rates=rates)
    report = find_plans(workload(precisions=BOTH), old, allow=("bf16-mixed",))
    assert report.best.precision == "32-true"
    assert report.candidates[-1].reason == "test cannot compute matrix products in bfloat16"
    with pytest.raises(
        PlanError, match="precision='bf16-mixed' was asked for and test cannot compute it; take '32-true'"
    ):
        find_plans(workload(precisions=BOTH), old, precision="bf16-mixed")


def test_blockless():
    report = find_plans(workload(blocks=0, steps={"32-true": step(blocks=0)}), hardware(1))
    assert report.best == Plan()
    assert report.candidates[-1].reason == "Net has no repeated blocks, so nothing to recompute block by block"
    assert report.candidates[-1].estimate is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow": "bf16-mixed"}, "allow='bf16-mixed' is not accepted"),
        ({"allow": None}, "allow=None is not accepted; give a tuple of 'bf16-mixed'"),
        ({"allow": 5}, "allow=5 is not accepted; give a tuple of 'bf16-mixed'"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 is not accepted; give a whole number, 1 or more"),
        ({"accumulate_grad_batches": -3}, "accumulate_grad_batches=-3 is not accepted"),
        ({"accumulate_grad_batches": "2"}, "accumulate_grad_batches='2' is not accepted"),
        ({"baseline_bytes": -(10**12)}, "baseline_bytes=-1000000000000 is not accepted; give a whole number, 0 or"),
        ({"memory_budget": 0.5}, "memory_budget=0.5 is no size; give 1 byte or more"),
        ({"allow": ("int7",)}, r"allow=\('int7',\) is not accepted; give a tuple of 'bf16-mixed'"),
        ({"memory_budget": "lots"}, "memory_budget='lots' is no size"),
        ({"precision": "16-true"}, "precision='16-true' was not traced; accepted: '32-true'"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(PlanError, match=message):
        find_plans(workload(), hardware(1), **changes)


def test_a_link_that_was_not_measured():
    alone = dataclasses.replace(hardware(1), rates=dataclasses.replace(hardware(1).rates, **dict.fromkeys(LINKS)))
    assert find_plans(workload(), alone).best == Plan()
    more = dataclasses.replace(alone, ranks_per_node=4)
    message = "has 4 ranks and no rate of all_gather or reduce_scatter or all_reduce between them; calibrate it with 4"
    with pytest.raises(PlanError, match=message):
        find_plans(workload(), more)
    gathers = dataclasses.replace(more, rates=dataclasses.replace(more.rates, all_gather=hardware(1).rates.all_gather))
    assert find_plans(workload(stage="predict", optimizers=()), gathers).fits


def test_nothing_to_train_and_nothing_measured():
    with pytest.raises(PlanError, match="Net has no parameters"):
        find_plans(workload(parameters=()), hardware(1))
    unmeasured = dataclasses.replace(hardware(1), rates=None, origin="file")
    with pytest.raises(PlanError, match="without measured rates"):
        find_plans(workload(), unmeasured)


def test_large_modules_are_gathered_by_themselves_where_that_fits_better():
    first = segment("embedding", saved=0, entry=0, peak=MIB, exit_=0, backward_peak=MIB)
    steps = {"32-true": dataclasses.replace(step(), segments=(first, *step().segments))}
    parameters = [dataclasses.replace(one, block=one.block or "embedding") for one in workload().parameters]
    work = workload(steps=steps, parameters=tuple(parameters), wraps=("embedding",))
    report = find_plans(work, hardware(2))
    peaks = {row.plan: row.estimate.peak_bytes["device"] for row in report.candidates if row.estimate}
    alone, wrapped = Plan(dp_shard=2), Plan(dp_shard=2, extra_fsdp_modules=("embedding",))
    assert peaks[wrapped] < peaks[alone]
    # Without its gather in backward the other is faster, on a machine that hides nothing.
    seconds = {row.plan: row.estimate.step_seconds for row in report.candidates if row.estimate}
    assert seconds[alone] < seconds[wrapped]
    assert {plan.extra_fsdp_modules for plan in peaks if not plan.reshard_after_forward} == {("embedding",)}
    assert {plan.extra_fsdp_modules for plan in peaks if plan.dp_shard == 1} == {()}
    tight = find_plans(work, hardware(2), memory_budget=(peaks[wrapped] + peaks[alone]) // 2)
    fitting = [row.plan for row in tight.candidates if row.status in ("chosen", "fits")]
    assert wrapped in fitting
    assert alone not in fitting
    wrapped.validate(workload=work)
    with pytest.raises(PlanError, match=r"extra_fsdp_modules has 'head', which is no module of .*; accepted are 'em"):
        Plan(extra_fsdp_modules=("head",)).validate(workload=work)
    with pytest.raises(PlanError, match=r"extra_fsdp_modules has 'head', .*; there is none"):
        Plan(extra_fsdp_modules=("head",)).validate(workload=workload())
