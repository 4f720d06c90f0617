"""Averages of weights, under every plan those of a plain run: evaluated, kept, written, gone on with."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from callbacks.averages import EPOCHS, KINDS, STEPS, Normalised, checkpoints, train
from ranks import quiet

from lightning_largescale.plan import Plan

pytestmark = quiet

PLANS = {
    "replicate": Plan(dp_replicate=2),
    "ZeRO-2": Plan(dp_shard=2, reshard_after_forward=False),
    "ZeRO-3": Plan(dp_shard=2, activation_checkpointing="full"),
}
HSDP = Plan(dp_replicate=2, dp_shard=2)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What stock Lightning does in one process, and where it keeps its checkpoints."""

    @cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        return train(None, 1, kind, folder), folder

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def assert_close(found, expected, rel=1e-4):
    """The same structure, and plain tensors of the same values."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, rtol=rel, atol=rel)
    elif isinstance(expected, dict):
        assert sorted(found, key=str) == sorted(expected, key=str)
        for key, value in expected.items():
            assert_close(found[key], value, rel)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rel)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel)
    else:
        assert found == expected


def assert_same_run(found, expected, epochs=EPOCHS):
    steps, evaluations = STEPS * epochs, epochs
    assert found["losses"][-steps:] == pytest.approx(expected["losses"][-steps:], rel=1e-4)
    assert found["evaluated"][-evaluations:] == pytest.approx(expected["evaluated"][-evaluations:], rel=1e-4)
    assert_close(found["weights"], expected["weights"])


def assert_same_files(folder, expected):
    ours, theirs = checkpoints(folder), checkpoints(expected)
    assert list(ours) == list(theirs)
    for name, content in theirs.items():
        for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert (part in ours[name]) == (part in content)
            assert_close(ours[name].get(part), content.get(part))
        averages = [key for key in content["callbacks"] if "Averaging" in key]
        assert averages
        for key in averages:
            assert_close(ours[name]["callbacks"][key], content["callbacks"][key])


def cases():
    for kind in KINDS:
        for plan in PLANS:
            everyday = (kind, plan) in [
                ("swa", "ZeRO-3"),
                ("average", "replicate"),
                ("ema", "ZeRO-3"),
            ]
            yield pytest.param(kind, plan, marks=[] if everyday else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "plan"), list(cases()))
def test_averages_are_those_of_a_plain_run(two, stock, tmp_path, kind, plan):
    expected, folder = stock(kind)
    for found in two.run(train, PLANS[plan], 2, kind, tmp_path):
        assert_same_run(found, expected)
        if PLANS[plan].dp_shard > 1:
            assert found["held"] < 0.55 * found["whole"]
    assert_same_files(tmp_path, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_averages_under_hybrid_sharding(four, stock, tmp_path, kind):
    expected, folder = stock(kind)
    for found in four.run(train, HSDP, 4, kind, tmp_path):
        assert_same_run(found, expected)
        assert found["held"] < 0.55 * found["whole"]
    assert_same_files(tmp_path, folder)


def resume_cases():
    for kind in KINDS:
        for plan in PLANS:
            yield pytest.param(kind, plan, marks=[] if (kind, plan) == ("ema", "ZeRO-3") else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "plan"), list(resume_cases()))
def test_going_on_from_averages_of_stock_lightning_and_back(two, stock, tmp_path, kind, plan):
    expected, folder = stock(kind)
    resumed = train(None, 1, kind, tmp_path / "stock", resume=folder / "epoch=2.ckpt")
    assert_same_run(resumed, expected, epochs=1)
    for found in two.run(train, PLANS[plan], 2, kind, tmp_path / "ours", resume=folder / "epoch=1.ckpt"):
        assert_same_run(found, expected, epochs=2)
    back = train(None, 1, kind, tmp_path / "back", resume=tmp_path / "ours" / "epoch=2.ckpt")
    assert_same_run(back, expected, epochs=1)
    other = PLANS["ZeRO-2" if plan == "ZeRO-3" else "ZeRO-3"]
    for found in two.run(train, other, 2, kind, tmp_path / "other", resume=tmp_path / "ours" / "epoch=2.ckpt"):
        assert_same_run(found, expected, epochs=1)


@pytest.mark.parametrize("kind", [pytest.param("swa", marks=pytest.mark.slow), "average"])
@pytest.mark.parametrize("then", ["ZeRO-3", "ZeRO-2", pytest.param("replicate", marks=pytest.mark.slow)])
def test_a_second_fit_of_the_same_module(two, tmp_path, kind, then):
    expected = train(None, 1, kind, tmp_path / "stock", then=[None])
    for found in two.run(train, PLANS["ZeRO-3"], 2, kind, tmp_path / "ours", then=[PLANS[then]]):
        assert_same_run(found, expected, epochs=2 * EPOCHS)
        assert (found["held"] < 0.55 * found["whole"]) == (PLANS[then].dp_shard > 1)


def test_statistics_gathered_for_the_average(two, tmp_path):
    """A pass without backward; its statistics are each rank's, so what is compared with is torch's data parallel."""
    (expected, _) = two.run(train, "ddp", 2, "swa", tmp_path / "stock", model=Normalised)
    assert expected["weights"]["blocks.2.1.num_batches_tracked"] == STEPS
    for plan in PLANS:
        (found, _) = two.run(train, PLANS[plan], 2, "swa", tmp_path / plan, model=Normalised)
        assert_same_run(found, expected, epochs=EPOCHS)
