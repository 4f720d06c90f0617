"""Every kind of tensor in parameters and buffers under every plan: as one process has it, or refused at setup."""

from __future__ import annotations

import dataclasses
import functools
import os

import kinds
import pytest
import torch
from ranks import quiet

from lightning_largescale import compat
from lightning_largescale.auto import LargeScaleAutoStrategy
from lightning_largescale.errors import PlanError
from lightning_largescale.hardware import Hardware
from lightning_largescale.parallel.mesh import build_mesh
from lightning_largescale.parallel.shard import shard_groups
from lightning_largescale.plan import Plan
from lightning_largescale.planner import find_plans
from lightning_largescale.strategy import LargeScaleStrategy
from lightning_largescale.workload import Workload

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore")]

GATHERING = {name for name, plan in kinds.PLANS.items() if plan.gathers}
SEVERAL = {name for name, plan in kinds.PLANS.items() if plan.world_size > 1}
EVERY = {*kinds.PLANS}
# By kind, the plans that refuse it, and in which words.
REFUSED = {
    "same_memory": (GATHERING, "elements in the same memory"),
    "expanded": (EVERY, "is expanded"),
    "float8_parameter": (GATHERING, "float8_e4m3fn, which not every backend gathers"),
    "subclass_parameter": (GATHERING | SEVERAL, "of the class Loud"),
    "trained_coo_parameter": (EVERY - {"plain"}, "is sparse"),
    "meta_buffer": (EVERY, "is on the meta device"),
    "meta_parameter": (EVERY, "is on the meta device"),
    "lazy": (EVERY - {"plain"}, "is of a lazy module"),
    "lazy_buffers": (EVERY - {"plain"}, "is of a lazy module"),
}
# In blocks, tensor parallelism finds nothing to divide beside these; of the last four there are no fakes to find it on.
_BESIDE = ("complex_most", "parameter_class", "nested_buffer", "jagged_buffer")
_BESIDE += ("quantized_buffer", "channel_quantized_buffer")
IN_BLOCKS = {kind: ({"tp"}, "tp=2 divides nothing") for kind in _BESIDE}
# Of these torch itself loads no state.
UNLOADABLE = {"expanded_frozen"}
# Digits of what is computed in two halves of a batch, or summed in another order.
ROUGH = {"bfloat16": 2e-2, "bfloat16_and_scales": 2e-2}
QUICK = {
    ("no_elements", "ZeRO-3"),
    ("no_elements_in_rows", "nvme"),
    ("channels_last", "ZeRO-3"),
    ("transposed", "tp"),
    ("permuted", "cpu"),
    ("float64", "ZeRO-3 nvme"),
    ("complex64", "ZeRO-2"),
    ("bfloat16_and_scales", "ZeRO-3"),
    ("csr_buffer", "ZeRO-3"),
    ("quantized_buffer", "nvme"),
    ("jagged_buffer", "replicate"),
    ("parameter_class", "cpu"),
    ("same_memory", "cpu"),
    ("subclass_parameter", "ZeRO-3"),
    ("expanded", "plain"),
    ("lazy", "tp"),
    ("lazy", "nvme"),
    ("lazy_buffers", "replicate"),
    ("lazy", "plain"),
}


def cells():
    for kind in kinds.MAKE:
        for plan in kinds.PLANS:
            for outside in (False, True) if plan in ("ZeRO-3", "tp", "cpu") else (False,):
                quick = not outside and (kind, plan) in QUICK
                place = "root" if outside else "blocks"
                yield pytest.param(
                    kind, plan, outside, id=f"{kind}-{plan}-{place}", marks=() if quick else pytest.mark.slow
                )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Of a kind and place, what a run of one process gives."""

    @functools.cache
    def given(kind, outside, resumes):
        folder = tmp_path_factory.mktemp(kind)
        losses, state, path = kinds.run(kind, "auto", folder, outside=outside)
        if not resumes:
            return losses, state, state
        return losses, state, state, *kinds.run(kind, "auto", folder, outside=outside, resume=path)[:2]

    return given


@pytest.mark.parametrize(("kind", "name", "outside"), list(cells()))
def test_as_one_process_has_it_or_refused(request, expected, tmp_path, kind, name, outside):
    plan, resumes = kinds.PLANS[name], kind not in UNLOADABLE
    if "nvme" in (plan.offload_parameters, plan.offload_optimizer):
        plan = dataclasses.replace(plan, nvme_path=str(tmp_path))
    arguments = (kind, plan, tmp_path, outside, resumes)
    if plan.world_size == 1:
        found = [kinds.round_trip(*arguments)]
    else:
        ranks = request.getfixturevalue({2: "two", 4: "four"}[plan.world_size])
        found = ranks.run(kinds.round_trip, *arguments)
    plans, words = {**({} if outside else IN_BLOCKS), **REFUSED}.get(kind, ((), ""))
    if name in plans:
        assert all(isinstance(one, str) and words in one for one in found), found
        return
    assert not any(isinstance(one, str) for one in found), found
    close = {"rtol": ROUGH.get(kind, 1e-5), "atol": ROUGH.get(kind, 1e-6)}
    for one in found:
        torch.testing.assert_close(one, expected(kind, outside, resumes), **close, equal_nan=True)


@pytest.mark.parametrize("kind", sorted({*kinds.MAKE} - {"meta_buffer", "meta_parameter", "lazy", "lazy_buffers"}))
def test_the_step_is_traced_and_plans_keep_whole_what_cannot_be_gathered(kind):
    batch = torch.stack([kinds.Rows()[index] for index in range(4)])
    workload = Workload.trace(kinds.Model(kind), batch, precisions=("32-true",))
    assert workload.steps["32-true"].segments
    report = find_plans(workload, Hardware.named("8xH100-80GB"))
    refused = REFUSED.get(kind, ((), ""))[0]
    kept = "ZeRO-3" in refused and kind != "expanded"
    assert bool(workload.whole) == kept
    assert all(not row.plan.gathers or row.status == "not possible" for row in report.candidates) == kept


@pytest.mark.parametrize("kind", ["coo_buffer", "lazy", "channels_last"])
def test_the_auto_strategy_on_one_process(expected, tmp_path, kind):
    losses, state, _ = kinds.run(kind, LargeScaleAutoStrategy(), tmp_path)
    torch.testing.assert_close((losses, state), expected(kind, False, False)[:2])


def groups_of(kind, outside):
    model, plan = kinds.Model(kind, outside=outside), Plan(dp_shard=2)
    state = shard_groups(model, plan, build_mesh(plan, "cpu"), torch.device("cpu"))
    return [{str(one.dtype) for one, _ in compat.shards_of(group)} for group in state.every_group()]


def test_a_group_has_one_dtype_and_a_block_that_of_most_of_its_bytes(two):
    for found in two.run(groups_of, "bfloat16_and_scales", False):
        assert found == [{"torch.float32"}] * 3 + [{"torch.bfloat16"}, {"torch.float16"}]
    for found in two.run(groups_of, "complex_most", False):
        assert found == [{"torch.complex64"}] * 2 + [{"torch.float32"}]


def unequal(plan):
    """What the ranks hold after setup of what each has drawn by itself."""
    model = kinds.Model("coo_buffer")
    model.blocks[0].graph = model.blocks[0].graph * (1 + torch.rand(()))
    kinds.trainer(LargeScaleStrategy(plan), devices=2, max_steps=1).fit(model)
    return model.blocks[0].graph.to_dense()


@pytest.mark.parametrize("name", ["replicate", "ZeRO-3"])
def test_sparse_buffers_are_rank_zeros_everywhere(two, name):
    one, other = two.run(unequal, kinds.PLANS[name])
    assert torch.equal(one, other)


def other_sparsity():
    model = kinds.Model("coo_buffer")
    model.blocks[0].graph = torch.eye(kinds.DIM)[: 1 + int(os.environ["RANK"])].sum(0).diag().to_sparse()
    kinds.trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=1).fit(model)


def test_sparse_buffers_of_other_sizes_are_refused(two):
    with pytest.raises(PlanError, match="other parameters or buffers on rank 1 than on rank 0"):
        two.run(other_sparsity)


class Thaws(kinds.Model):
    """Trains a frozen parameter of another dtype from the second step on."""

    def __init__(self):
        super().__init__("bfloat16")
        for block in self.blocks:
            block.low.requires_grad_(False)

    def on_train_batch_start(self, batch, index):
        if index == 1:
            self.blocks[1].low.requires_grad_(True)


def thaw():
    kinds.trainer(LargeScaleStrategy(Plan(dp_shard=2)), devices=2, max_steps=3).fit(Thaws())


def test_what_a_group_cannot_reduce_is_not_thawed(two):
    with pytest.raises(PlanError, match=r"'blocks.1.low' of bfloat16 was frozen when its block was sharded"):
        two.run(thaw)
