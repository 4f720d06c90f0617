"""Every plan on a CUDA device does what stock Lightning does in one process on the CPU, whatever it is asked for."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from cuda_matrix import ACTIONS, AOT, COMPILED, FITS, PLANS, Place, play
from ranks import quiet

from lightning_largescale.plan import Plan

pytestmark = [
    *quiet,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

# Optimizers step on lists of tensors on a device, and ranks sum in another order. In half precision the operations that
# a device's autocast leaves in float32 are others than the CPU's: within some units in the last place of its results.
CLOSE = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 2e-3}
# For every day each plan once, and each action.
QUICK = {
    "plain": "validate",
    "recompute": "fit",
    "recompute in part": "clipping by value",
    "optimizer in DRAM": "resume",
    "optimizer on disk": "save_full",
    "host step": "clipping",
    "host step from disk": "second fit",
    "parameters in DRAM": "batch size",
    "parameters on disk": "by hand",
    "activations in DRAM": "fit",
    "activations on disk": "ema",
    "all in DRAM": "clipping",
    "all on disk": "validate",
    "three tiers": "resume",
    "release": "fit",
    "release and host step": "resume",
    "release, all on disk": "second fit",
    "16-mixed": "fit",
    "bf16-mixed": "gradients by hand",
    "16-mixed, all in DRAM": "fit",
    "bf16-mixed, all on disk": "swa",
    "replicate": "fit",
    "ZeRO-2": "ema",
    "ZeRO-3": "swa",
    "ZeRO-3, parameters in DRAM": "save_full",
    "ZeRO-3, activations on disk": "fit",
    "ZeRO-3, release": "clipping",
    "ZeRO-3, 16-mixed": "clipping",
    "tp": "by hand",
    "table beside replicas": "fit",
    "HSDP": "fit",
    "2D": "clipping",
}
QUICK_COMPILED = {"plain": "second fit", "all on disk": "clipping", "ZeRO-3": "resume", "ZeRO-3, recompute": "fit"}
# What needs all gradients at once is refused where they are released, and a copy of a module with tables of many ranks.
REFUSED = {"release": {"clipping", "clipping by value", "by hand", "gradients by hand"}, "table": {"swa", "ema"}}


def cells():
    for name in PLANS:
        for action in ACTIONS:
            marks = [] if QUICK.get(name) == action else [pytest.mark.slow]
            yield pytest.param(name, action, id=f"{name}-{action}", marks=marks)


def compiled_cells():
    for name in COMPILED:
        for action in ACTIONS:
            marks = [] if QUICK_COMPILED.get(name) == action else [pytest.mark.slow]
            yield pytest.param(name, action, id=f"{name}-{action}", marks=marks)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What an action comes to in one process of stock Lightning on the CPU."""

    @cache
    def run(action, precision, sparse, batch_size):
        place = Place("cpu", tmp_path_factory.mktemp("stock"), None, precision, sparse, batch_size)
        return play(action, place)

    return run


@pytest.mark.parametrize(("name", "action"), list(cells()))
def test_as_stock_lightning_on_the_cpu(request, tmp_path, stock, name, action):
    check(request, stock, name, action, placed(name, tmp_path))


@pytest.mark.parametrize(("name", "action"), list(compiled_cells()))
def test_compiled_as_stock_lightning_on_the_cpu(request, tmp_path, stock, name, action):
    check(request, stock, name, action, placed(name, tmp_path, compiled=True))


@pytest.mark.parametrize("name", ["tp", pytest.param("2D", marks=pytest.mark.slow)])
def test_compiled_blocks_are_refused_beside_tensor_parallelism(request, tmp_path, name):
    for found in run(request, "fit", placed(name, tmp_path, compiled=True)):
        assert found == f"compile={AOT} cannot be combined with tp=2; leave one of them out."


def placed(name, folder, **options):
    plan = Plan(**PLANS[name])
    if plan.offloads:
        plan = dataclasses.replace(plan, nvme_path=str(folder))
    return Place("cuda", folder, plan, plan.precision, bool(plan.row_sharded_embeddings), **options)


def check(request, stock, name, action, place):
    plan = place.plan
    found = run(request, action, place)
    if any(word in name and action in actions for word, actions in REFUSED.items()):
        assert all(isinstance(one, str) for one in found)
        assert found == run(request, action, dataclasses.replace(place, accelerator="cpu"))
        return
    assert not any(isinstance(one, str) for one in found), found
    if action == "gradients by hand" and plan.world_size > 1 and not plan.shards:
        # Each rank's own, as under DistributedDataParallel.
        expected = run(request, action, dataclasses.replace(place, accelerator="cpu"))
    else:
        size = FITS * plan.dp if action == "batch size" else None
        expected = [stock(action, plan.precision, place.sparse, size)] * len(found)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, {key: other[key] for key in one}, CLOSE[plan.precision])


def run(request, action, place):
    """What each rank has found."""
    if place.plan.world_size == 1:
        return [play(action, place)]
    ranks = request.getfixturevalue({2: "two", 4: "four"}[place.plan.world_size])
    return ranks.run(play, action, place)


def assert_close(found, expected, close):
    """Tells of all that is not."""
    differ = {}
    for key, one in expected.items():
        try:
            torch.testing.assert_close(found[key], one, rtol=close, atol=close)
        except AssertionError as error:
            differ[key] = str(error)
    assert not differ, differ


def test_quick_cells_have_every_action_and_every_plan_of_one_process():
    assert {*QUICK.values()} == {*ACTIONS}
    assert {name for name, fields in PLANS.items() if Plan(**fields).world_size == 1} <= {*QUICK} <= {*PLANS}
