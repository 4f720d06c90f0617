"""Tensor parallel plans in the Trainer's hands, of models whose authors never thought of them."""

from __future__ import annotations

import os
from functools import cache

import pytest
from families import DECODERS, FAMILIES, Family
from models import trainer
from ranks import quiet
from torch.distributed.tensor import DTensor

from lightning_largescale.parallel.order import divided_dims
from lightning_largescale.plan import Plan
from lightning_largescale.strategy import LargeScaleStrategy

pytestmark = [
    *quiet,
    pytest.mark.filterwarnings("ignore:.*TypedStorage|.*enable_nested_tensor|.*`loss_type`"),
]

STEPS = 20
LAYOUTS = {
    "TP 4": Plan(tp=4),
    "TP 2 and ZeRO-3": Plan(tp=2, dp_shard=2),
    "TP 2 and replicate": Plan(tp=2, dp_replicate=2),
}


def fit(name, plan, devices, steps=STEPS):
    """Losses, and the share of the parameters that is divided by tensor parallelism."""
    model = Family(name, seed=int(os.environ.get("RANK", 0)))
    run = trainer(LargeScaleStrategy(plan) if plan else "auto", devices=devices, max_steps=steps)
    run.fit(model)
    ways = plan.tp * plan.dp_shard if plan else 1
    divided = sum(one.numel() for one in model.parameters() if isinstance(one, DTensor) and is_tensor_parallel(one))
    for one in model.parameters():
        if isinstance(one, DTensor) and is_tensor_parallel(one):
            uneven = any(one.shape[dim] % ways for dim in divided_dims(one))
            assert one.to_local().numel() == one.numel() / ways or uneven
    return model.losses, divided / sum(one.numel() for one in model.parameters())


def is_tensor_parallel(parameter):
    return "tp" in (parameter.device_mesh.mesh_dim_names or ()) and len(divided_dims(parameter)) > 1


@cache
def plain(name):
    return fit(name, None, 1)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_train_as_one(two, name):
    for losses, share in two.run(fit, name, Plan(tp=2), 2):
        assert losses == pytest.approx(plain(name), rel=1e-4)
        assert share >= (0.95 if name in DECODERS else 0.7), share


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "torch"])
def test_four_ranks_train_as_one(four, name, layout):
    for losses, _ in four.run(fit, name, LAYOUTS[layout], 4):
        assert losses == pytest.approx(plain(name), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_ranks_that_share_the_sequence_train_as_one(two, name):
    for losses, _ in two.run(fit, name, Plan(tp=2, sequence_parallel=True), 2):
        assert losses == pytest.approx(plain(name), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama", "gpt2", "bert", "t5")])
def test_ranks_that_share_the_sequence_train_every_family_as_one(two, name):
    for losses, _ in two.run(fit, name, Plan(tp=2, sequence_parallel=True), 2):
        assert losses == pytest.approx(plain(name), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama", "gpt2", "torch")])
def test_four_ranks_train_every_family_as_one(four, name, layout):
    for losses, _ in four.run(fit, name, LAYOUTS[layout], 4):
        assert losses == pytest.approx(plain(name), rel=1e-4)
