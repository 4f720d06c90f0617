"""Lightning's callbacks bring about under every plan what they do in a plain run of stock Lightning."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from callbacks.cases import CASES, play, pruning
from ranks import quiet

from lightning_largescale.errors import PlanError
from lightning_largescale.plan import Plan

pytestmark = quiet

PLANS = {
    "plain": Plan(),
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2),
    "HSDP": Plan(dp_replicate=2, dp_shard=2),
}
# What every rank must find; the rest only rank 0 can know.
LOGGED = {"rate_monitor", "device_stats", "throughput"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What a case comes to in one process of stock Lightning."""
    found = {}

    def run(case):
        if case not in found:
            found[case] = play(case, "auto", 1, tmp_path_factory.mktemp(case))
        return found[case]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def assert_alike(found, expected, where=""):
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_alike(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), where
        assert not math.isnan(found)
    else:
        assert found == expected, where


def matrix():
    """For every day ZeRO-3 of each second case, and of the others in turns the plans of two processes or fewer."""
    turns = itertools.cycle(["ZeRO-3", "plain", "ZeRO-3", "replicate", "ZeRO-3", "ZeRO-2"])
    for case in CASES:
        everyday = next(turns)
        for plan in PLANS:
            yield pytest.param(case, plan, marks=[] if plan == everyday else pytest.mark.slow)


@pytest.mark.parametrize(("case", "plan"), list(matrix()))
def test_callback_works_as_in_stock_lightning(request, tmp_path, stock, case, plan):
    if case == "pruning" and PLANS[plan].dp_shard > 1:
        pytest.skip("refused: see below")
    devices = PLANS[plan].dp_replicate * PLANS[plan].dp_shard
    if devices == 1:
        results = [play(case, PLANS[plan], 1, tmp_path)]
    else:
        ranks = request.getfixturevalue("two" if devices == 2 else "four")
        results = ranks.run(play, case, PLANS[plan], devices, tmp_path)
    expected = stock(case)
    assert any(expected.values())
    for found in results[: 1 if case in LOGGED else None]:
        assert_alike(found, expected)


def pruned(folder):
    with pytest.raises(PlanError) as told:
        pruning(PLANS["ZeRO-3"], 2, folder)
    return str(told.value)


def test_pruning_of_shards_is_refused_on_every_rank(two, tmp_path):
    for told in two.run(pruned, tmp_path):
        assert told == (
            "ModelPruning replaces parameters by masked ones and the plan (ZeRO-3 over 2 devices, 32-true) divides"
            " them among ranks; replicate with dp_replicate, or prune after training."
        )
