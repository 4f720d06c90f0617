import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from planner.builders import MIB, MODEL, hardware, parameter, peak_of, step, workload

from lightning_largescale.plan import Plan
from lightning_largescale.planner.peak_memory import _moments, peak_memory
from lightning_largescale.planner.sizes import Sizes

PLAIN = Plan()


def test_plain_peak_is_the_head_with_last_steps_gradients():
    estimate = peak_of(baseline_bytes=100)
    # Lightning clears gradients after the forward: all of them are there while the head runs.
    assert estimate.moment == "forward of what follows blocks.3"
    assert estimate.terms["activations"] == (4 * 64 + 2 * 32) * MIB
    assert estimate.terms["gradients"] == estimate.terms["parameters"] == MODEL
    assert estimate.terms["optimizer state"] == 2 * MODEL
    assert estimate.terms["process before"] == 100
    assert estimate.peak_bytes == sum(estimate.terms.values())


def test_accumulating_without_communication_keeps_whole_gradients():
    assert peak_of(Plan(dp_shard=2), world=2, accumulate_grad_batches=2).terms["gradients"] == MODEL


def test_evaluation_keeps_neither_gradients_nor_states():
    estimate = peak_of(work=workload(stage="validate"))
    assert not {"gradients", "optimizer state"} & set(estimate.terms)


def test_a_sharded_model_is_whole_at_setup_on_cpu():
    frozen = tuple(dataclasses.replace(p, trainable=False) for p in workload().parameters)
    tiny = workload(steps={"32-true": step(saved=8, head=8)}, optimizers=(), parameters=frozen)
    estimate = peak_memory(tiny, Plan(dp_shard=8), hardware(8))
    assert (estimate.moment, estimate.terms["parameters"]) == ("setup", MODEL)
    on_cuda = peak_memory(tiny, Plan(dp_shard=8), hardware(8, kind="cuda"))
    assert on_cuda.terms["parameters"] == MODEL // 8


def test_on_cuda_the_measured_bytes_leave_out_holes_and_no_number_has_the_context():
    cpu, cuda = (peak_memory(workload(), PLAIN, hardware(1, kind=kind)) for kind in ("cpu", "cuda"))
    assert cpu.measured_bytes == cpu.peak_bytes
    assert cuda.measured_bytes == cuda.peak_bytes - cuda.terms["allocator"]
    # Workspaces of two threads.
    assert cuda.terms["runtime"] == 64 * MIB


def on_cuda(plan, moment, index, *, work=None, accumulate=1):
    found = Sizes(work or workload(), plan, "cuda", accumulate)
    (terms,) = (terms for name, at, terms in _moments(found, 0, True) if (name, at) == (moment, index))
    return terms


def test_what_ranks_sent_for_a_gather_stays_on_cuda_until_the_next():
    # Root and block, and what came for the block; after the last one what came for that.
    assert on_cuda(Plan(dp_shard=2), "forward", 1)["gathered parameters"] == (8 + 2 * 16) * MIB
    assert on_cuda(Plan(dp_shard=2), "forward", 4)["gathered parameters"] == (8 + 16) * MIB
    zero2 = Plan(dp_shard=2, reshard_after_forward=False)
    assert on_cuda(zero2, "forward", 4)["gathered parameters"] == (8 + 5 * 16) * MIB
    assert on_cuda(zero2, "backward", 4)["gathered parameters"] == (8 + 4 * 16) * MIB


def test_one_rank_gathers_nothing_ahead_on_cuda():
    alone, two = Plan(offload_parameters="cpu"), Plan(offload_parameters="cpu", dp_shard=2)
    assert on_cuda(alone, "forward", 1)["gathered parameters"] == (8 + 16) * MIB
    assert on_cuda(alone, "backward", 1)["gathered parameters"] == (8 + 16) * MIB
    assert on_cuda(two, "backward", 1)["gathered parameters"] == (8 + 2 * 16) * MIB


def test_gradients_of_the_root_are_there_on_cuda_when_they_have_come():
    head = parameter("head", None, rows=1024)
    segments = [*step().segments]
    segments[0] = dataclasses.replace(segments[0], completed=("embedding",))
    segments[4] = dataclasses.replace(segments[4], completed=("head",))
    seen = workload(
        parameters=(*workload().parameters, head), steps={"32-true": dataclasses.replace(step(), segments=(*segments,))}
    )
    for plan, name in ((PLAIN, "gradients"), (Plan(dp_shard=2), "unreduced gradients")):
        root = [on_cuda(plan, "backward", index, work=seen)[name] for index in (4, 3, 0)]
        later = [on_cuda(plan, "backward", index, work=workload())[name] for index in (4, 3, 0)]
        # Without what the trace tells, all of them are; of the head there are 4 MiB, of the embedding 8.
        assert [one - other for one, other in zip(root, later, strict=True)] == [-4 * MIB, -4 * MIB, 4 * MIB]


def test_of_its_own_gradients_a_block_has_on_cuda_those_that_the_trace_saw():
    seen = workload(
        steps={
            "32-true": dataclasses.replace(
                step(), segments=tuple(dataclasses.replace(one, backward_gradient_bytes=MIB) for one in step().segments)
            )
        }
    )
    sharded = Plan(dp_shard=2)
    assert on_cuda(sharded, "backward", 2)["unreduced gradients"] == (8 + 16) * MIB
    assert on_cuda(sharded, "backward", 2, work=seen)["unreduced gradients"] == (8 + 1) * MIB
    assert on_cuda(PLAIN, "backward", 2, work=seen)["gradients"] == (8 + 16 + 1) * MIB
    on_cpu = {at: found for name, at, found in _moments(Sizes(seen, sharded, "cpu"), 0, True) if name == "backward"}
    assert on_cpu[2]["unreduced gradients"] == (8 + 16) * MIB
    # When they are reduced all are there, and the copy that is sent; what was gathered of the block no more.
    reduction = on_cuda(sharded, "gradient reduction", 2, work=seen)
    assert reduction["unreduced gradients"] == (8 + 16) * MIB
    assert reduction["communication"] == 16 * MIB
    assert reduction["gathered parameters"] == (8 + 16) * MIB


@given(
    blocks=st.integers(1, 12),
    saved=st.integers(0, 2**30),
    shard=st.sampled_from([1, 2, 4, 8]),
    full=st.booleans(),
    reshard=st.booleans(),
    accumulate=st.integers(1, 4),
)
def test_every_moment_is_a_sum_and_recomputing_never_needs_more_than_one_block_extra(
    blocks, saved, shard, full, reshard, accumulate
):
    work = workload(blocks=blocks, steps={"32-true": step(blocks=blocks, saved=saved)})
    plan = Plan(dp_shard=shard, reshard_after_forward=reshard or shard == 1)
    again = Plan(dp_shard=shard, reshard_after_forward=reshard or shard == 1, activation_checkpointing="full")
    chosen = peak_memory(work, again if full else plan, hardware(shard), accumulate_grad_batches=accumulate)
    assert chosen.peak_bytes == sum(chosen.terms.values())
    assert all(size > 0 for size in chosen.terms.values())
    without = peak_memory(work, plan, hardware(shard), accumulate_grad_batches=accumulate)
    assert (
        peak_memory(work, again, hardware(shard), accumulate_grad_batches=accumulate).peak_bytes <= without.peak_bytes
    )
