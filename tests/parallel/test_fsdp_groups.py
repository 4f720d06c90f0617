"""FSDP groups in their order, and the tiers of their shards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import Language
from ranks import quiet

from lightning_largescale import compat
from lightning_largescale.parallel.fsdp_groups import block_tiers, in_order
from lightning_largescale.parallel.mesh import build_mesh
from lightning_largescale.parallel.shard import shard_groups
from lightning_largescale.plan import Plan
from lightning_largescale.tiers import group_tiers
from lightning_largescale.workload.blocks import find_groups

pytestmark = quiet


def tiers_before_and_after(gather_type, fields):
    """Of blocks that leave a device, as they are before they are divided and as their shards say."""
    module = Language(layers=5, seed=0)
    plan = Plan(dp_shard=2, offload_parameters="nvme", extra_fsdp_modules=("embedding", "head"), **fields)
    found = in_order(module, find_groups(module, plan.extra_fsdp_modules))
    before = block_tiers(module, plan, found, {}, gather_type)
    every = block_tiers(module, dataclasses.replace(plan, resident_parameter_bytes=None), found, {}, gather_type)
    groups = shard_groups(module, plan, build_mesh(plan, "cpu"), torch.device("cpu"), gather_type=gather_type).groups
    sizes = {name: sum(data.nbytes for _, data in compat.shards_of(groups[name])) for name in every}
    assert [*every] == [name for name in groups if name]
    return before, group_tiers(plan, sizes), sizes


@pytest.mark.parametrize("gather_type", [None, torch.bfloat16])
def test_shards_go_to_the_tiers_that_were_chosen_for_them(two, gather_type):
    for fields in ({}, {"cpu_parameter_bytes": 2**40}):
        for before, after, _ in two.run(tiers_before_and_after, gather_type, fields):
            assert before == after
            assert set(before.values()) == {"cpu" if fields else "nvme"}
    sizes = two.run(tiers_before_and_after, gather_type, {})[0][2]
    last, other = [*sizes.values()][-1:-3:-1]
    for stays in (last - 1, last, last + other - 1, last + other):
        fields = {"resident_parameter_bytes": stays, "cpu_parameter_bytes": 2 * other}
        for before, after, _ in two.run(tiers_before_and_after, gather_type, fields):
            assert before == after
            assert len(before) == len(sizes) - (stays >= last) - (stays >= last + other)
            assert set(before.values()) == {"cpu", "nvme"}
