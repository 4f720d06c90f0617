"""Every plan on a CUDA device does what one process of stock Lightning does on the CPU, whatever a Trainer is asked for."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from cuda_matrix import ACTIONS, FITS, PLANS, Place, play
from ranks import quiet

from lightning_largescale.plan import Plan

pytestmark = [
    *quiet,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

CLOSE = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 2e-3}


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
        place = Place("cpu", tmp_path_factory.mktemp("stock"), None, precision, sparse=sparse, batch_size=batch_size)
        return play(action, place)

    return run


def cells():
    for name in PLANS:
        for action in ACTIONS:
            yield pytest.param(name, action, id=f"{name}-{action}", marks=())


@pytest.mark.parametrize(("name", "action"), list(cells()))
def test_as_stock_lightning_on_the_cpu(request, tmp_path, stock, name, action):
    plan = Plan(**PLANS[name])
    if plan.offloads:
        plan = dataclasses.replace(plan, nvme_path=str(tmp_path))
    sparse = bool(plan.row_sharded_embeddings)
    place = Place("cuda", tmp_path, plan, plan.precision, sparse)
    found = run(request, action, place)
    expected = stock(action, plan.precision, sparse, FITS * plan.dp if action == "batch size" else None)
    if isinstance(found[0], str):
        refused = run(request, action, dataclasses.replace(place, accelerator="cpu"))
        assert found == refused
        return
    close = CLOSE[plan.precision]
    for one in found:
        assert_close(one, {key: expected[key] for key in one}, close)


def assert_close(found, expected, close):
    differ = {}
    for key, one in expected.items():
        try:
            torch.testing.assert_close(found[key], one, rtol=close, atol=close)
        except AssertionError as error:
            differ[key] = str(error)
    assert not differ, differ


def run(request, action, place):
    if place.plan.world_size == 1:
        return [play(action, place)]
    ranks = request.getfixturevalue({2: "two", 4: "four"}[place.plan.world_size])
    return ranks.run(play, action, place)
